"""The native runtime: decoder layers in compiled kernels, for bfloat16 on x86 and Arm CPUs."""
