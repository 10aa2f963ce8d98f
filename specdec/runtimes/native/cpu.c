/* Detection of instruction sets, and large pages. */
#include "native.h"
#ifdef SPECDEC_NATIVE
#include <cpuid.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

int has_amx, amx_blocks;

int specdec_amx_agrees_avx512(void);

/* Bytes of `rows` rows of `tiles` tiles of `kind`. */
EXPORT int64_t specdec_tiles_bytes(int kind, int64_t rows, int64_t tiles) { return rows * tiles_bytes(kind, tiles); }

/* The sizes of the structures that Python writes (library.py), in its order. */
EXPORT void specdec_sizes(int32_t sizes[7]) {
    const size_t own[] = {sizeof(Map), sizeof(Table), sizeof(LowRank), sizeof(Layer), sizeof(Model), sizeof(Sequence), sizeof(Call)};
    for (int i = 0; i < 7; i++) sizes[i] = (int32_t)own[i];
}

/* Request large pages for memory that every pass reads. */
EXPORT void specdec_large_pages(void *memory, int64_t bytes) {
    uintptr_t from = ((uintptr_t)memory + 4095) & ~(uintptr_t)4095, to = ((uintptr_t)memory + (uintptr_t)bytes) & ~(uintptr_t)4095;
    if (to > from) madvise((void *)from, to - from, MADV_HUGEPAGE);
}

static int has_avxvnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}

static int supported(void) {
    unsigned a, b, c, d;
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return 0;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")))
        return has_avxvnni() ? AVXVNNI : AVX2;
    int tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1 && d >> 24 & 1 && d >> 25 & 1; /* AMX-BF16, AMX-TILE, AMX-INT8 */
    return tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? AMX : AVX512; /* ARCH_REQ_XCOMP_PERM: tile data */
}

/* The best instruction set of this CPU that has kernels, `most` at most; 0: none. Call it first. */
EXPORT int specdec_open(int most) {
    int found = supported();
    has_amx = found == AMX && most >= AMX;
    amx_blocks = has_amx && specdec_amx_agrees_avx512();
    if (found > AVXVNNI && most == AVXVNNI) found = has_avxvnni() ? AVXVNNI : AVX2; /* AVX-512's own products are no AVX-VNNI */
    return found < most ? found : most;
}
#else
EXPORT int specdec_open(int most) { return 0; }
#endif
