"""The native runtime: decoder layers in compiled kernels, for bfloat16 on x86 CPUs with AVX-512 BF16."""
