/* What this CPU has, and large pages. */
#include "native.h"
#ifdef SPECDEC_NATIVE
#include <cpuid.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

int has_amx, has_vnni;

/* Bytes of `tiles` tiles of `kind`; 0 for one that this CPU does not have, or does better without. */
EXPORT int64_t specdec_tiles_bytes(int kind, int64_t tiles) {
    return (kind == I8 && !has_vnni && !has_amx) || (kind == I4 && (!has_vnni || has_amx)) ? 0 : tiles_bytes(kind, tiles);
}

/* Ask for large pages for memory that will be read in whole, again and again. */
EXPORT void specdec_large_pages(void *memory, int64_t bytes) {
    uintptr_t from = ((uintptr_t)memory + 4095) & ~(uintptr_t)4095, to = ((uintptr_t)memory + (uintptr_t)bytes) & ~(uintptr_t)4095;
    if (to > from) madvise((void *)from, to - from, MADV_HUGEPAGE);
}

/* What this CPU can do: 0 nothing here, 1 AVX-512 BF16, 2 AMX too. `most` forbids more. Call first. */
EXPORT int specdec_open(int most) {
    unsigned a, b, c, d;
    __builtin_cpu_init();
    if (most < 1 || !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16")))
        return 0;
    int tiles = most > 1 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1 && d >> 24 & 1 && d >> 25 & 1; /* AMX-BF16, AMX-TILE, AMX-INT8 */
    if (tiles) tiles = syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM: tile data */
    has_vnni = __builtin_cpu_supports("avx512vnni") > 0, has_amx = tiles; /* once: another thread may be using them */
    return tiles ? 2 : 1;
}
#else
EXPORT int specdec_open(int most) { return 0; }
#endif
