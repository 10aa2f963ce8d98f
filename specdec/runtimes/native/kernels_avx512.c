/* The kernels in AVX-512 BF16, and in AMX where the CPU has that too. */
#include "native.h"
#if defined(SPECDEC_NATIVE) && defined(__x86_64__)
/* Before immintrin.h and everything else that is compiled. */
#pragma GCC target("prfchw,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,f16c,fma,avx2,amx-tile,amx-bf16,amx-int8")
#include <immintrin.h>

#define KERNEL(name) specdec_##name##_avx512
#include "kernels/simd_avx512.h"
#include "kernels/simd.h"
#include "kernels/integer.c"
#include "kernels/avx512.c"
#include "kernels/amx.c"
#include "kernels/algorithms.h"
#endif
