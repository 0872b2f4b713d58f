"""Where text comes from and how it becomes samples: calibration, tuning and held-out."""
