"""The LoSA rounds: schedule, calibration streams, rates, masks, reconstruction errors and ranks."""
