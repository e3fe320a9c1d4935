"""How sure a prediction is: factors on the calibration, drawn once per run, become bands of every headline metric."""
