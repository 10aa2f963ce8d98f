/* The kernels in NEON, with dot products. */
#include "native.h"
#if defined(SPECDEC_NATIVE) && defined(__aarch64__)
#include <arm_neon.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define KERNEL(name) specdec_##name##_neon
#include "kernels/neon.h"
#include "kernels/simd_avx2.h"
#include "kernels/simd.h"
#include "kernels/integer.c"
#include "kernels/avx2.c"
#include "kernels/algorithms.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
