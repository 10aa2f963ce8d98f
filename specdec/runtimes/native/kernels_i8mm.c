/* The kernels in NEON, with dot products and matrix products of bytes. */
#include "native.h"
#if defined(SPECDEC_NATIVE) && defined(__aarch64__)
#include <arm_neon.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod,i8mm"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif

#define KERNEL(name) specdec_##name##_i8mm
#include "kernels/neon.h"
#include "kernels/simd_avx2.h"
#include "kernels/simd.h"
#include "kernels/i8mm.h"
#include "kernels/integer.c"
#include "kernels/avx2.c"
#include "kernels/algorithms.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
