"""A run's result in the layouts that other software reads: PEFT, a merged model, bitsandbytes' 4 bits."""
