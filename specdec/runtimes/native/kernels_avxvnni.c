/* The kernels in AVX2, FMA and F16C, with AVX-VNNI's products of whole numbers. */
#include "native.h"
#if defined(SPECDEC_NATIVE) && defined(__x86_64__)
/* Before immintrin.h and everything else that is compiled. */
#pragma GCC target("avx2,fma,f16c,avxvnni")
#include <immintrin.h>

#define KERNEL(name) specdec_##name##_avxvnni
#include "kernels/simd_avx2.h"
#include "kernels/simd.h"
#include "kernels/integer.c"
#include "kernels/avx2.c"
#include "kernels/algorithms.h"
#endif
