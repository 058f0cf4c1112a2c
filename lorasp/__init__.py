import logging

# bitsandbytes warns at import that an optional package with CPU matrix kernels, which nothing here uses, is absent.
# Here, because transformers may import it before any module of ours does.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
