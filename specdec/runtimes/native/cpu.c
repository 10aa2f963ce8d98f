/* Detection of instruction sets, and large pages. */
#include "native.h"
#ifdef SPECDEC_NATIVE
#include <sys/mman.h>
#include <unistd.h>

int has_amx;

/* Bytes of `rows` rows of `tiles` tiles of `kind`. */
EXPORT int64_t specdec_tiles_bytes(int kind, int64_t rows, int64_t tiles) { return rows * tiles_bytes(kind, tiles); }

/* The sizes of the structures that Python writes (library.py), in its order. */
EXPORT void specdec_sizes(int32_t sizes[11]) {
    const size_t own[] = {sizeof(LinearPart), sizeof(Linear), sizeof(Table), sizeof(Layer), sizeof(Model),
        sizeof(Sequence), sizeof(Call), sizeof(Stage), sizeof(Sampled), sizeof(Given), sizeof(TreeDraft)};
    for (int i = 0; i < 11; i++) sizes[i] = (int32_t)own[i];
}

/* Request large pages for memory that every pass reads. */
EXPORT void specdec_large_pages(void *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = ((uintptr_t)memory + page - 1) & -page,
        to = ((uintptr_t)memory + (uintptr_t)bytes) & -page;
    if (to > from) madvise((void *)from, to - from, MADV_HUGEPAGE);
#endif
}

#ifdef __aarch64__
#ifdef __APPLE__
int sysctlbyname(const char *name, void *value, size_t *size, void *new_value, size_t new_size);

static int has(const char *feature) {
    int32_t value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(feature, &value, &size, NULL, 0) && value;
}

static int supported(void) { return !has("hw.optional.arm.FEAT_DotProd") ? 0 : has("hw.optional.arm.FEAT_I8MM") ? I8MM : NEON; }
#else
#include <sys/auxv.h>

static int supported(void) { /* HWCAP_ASIMDDP, HWCAP2_I8MM */
    return !(getauxval(AT_HWCAP) >> 20 & 1) ? 0 : getauxval(AT_HWCAP2) >> 13 & 1 ? I8MM : NEON;
}
#endif

EXPORT int specdec_open(int most) { return supported() < most ? supported() : most; }
#else
#include <cpuid.h>
#include <sys/syscall.h>

int specdec_pairs_agree_avx512(void), specdec_tiles_agree_avx512(void);

static int has_avxvnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}

static int supported(void) {
    unsigned a, b, c, d;
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return 0;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
          specdec_pairs_agree_avx512()))
        return has_avxvnni() ? AVXVNNI : AVX2;
    int tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1 && d >> 24 & 1; /* AMX-BF16, AMX-TILE */
    tiles = tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM: tile data */
    return tiles && specdec_tiles_agree_avx512() ? AMX : AVX512;
}

/* The best instruction set of this CPU that has kernels, `most` at most; 0: none. Call it first. */
EXPORT int specdec_open(int most) {
    int found = supported();
    has_amx = found == AMX && most >= AMX;
    if (found > AVXVNNI && most == AVXVNNI) found = has_avxvnni() ? AVXVNNI : AVX2; /* AVX-512's own products are no AVX-VNNI */
    return found < most ? found : most;
}
#endif
#else
EXPORT int specdec_open(int most) { return 0; }
#endif
