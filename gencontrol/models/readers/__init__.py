"""Networks that read samples: encoders, classifiers and judges."""
