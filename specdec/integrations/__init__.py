"""Use specdec inside other libraries: transformers and lm-eval."""
