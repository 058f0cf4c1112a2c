"""What an import of the run's stages leaves out."""

import subprocess
import sys

IMPORTS = """
import sys, torch
compile_ = torch.compile
from lorasp import run
from lorasp.uncompiled import uncompiled
assert {"bitsandbytes", "deepspeed"} <= set(sys.modules)
assert "torch._inductor.compile_fx" not in sys.modules
assert torch.compile is compile_
with uncompiled():
    @torch.compile
    def plain(): ...
    @torch.compile(dynamic=True)
    def with_settings(): ...
assert plain.__name__ == "plain" and with_settings.__code__.co_name == "with_settings"
assert "torch._inductor.compile_fx" not in sys.modules and torch.compile is compile_
"""


def test_a_run_is_imported_without_the_compiler():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
