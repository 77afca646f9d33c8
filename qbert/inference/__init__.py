"""Fast inference of packed encoders on CPUs and GPUs: fused layers, no padding, compiled programs and CUDA graphs."""
