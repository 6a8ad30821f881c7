"""Will it fit, how long will it take, which method?  Answered from a config.json alone; only calibration.py imports torch."""
