"""Post-training quantization: methods that need samples of the inputs, or none, but no training."""
