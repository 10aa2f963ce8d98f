/* Detection of instruction sets, and large pages. */
#include "native.h"
#ifdef SPECDEC_NATIVE
#include <sys/mman.h>
#include <time.h>

int has_amx;

/* Bytes of `rows` rows of `tiles` tiles of `kind`. */
EXPORT int64_t specdec_tiles_bytes(int kind, int64_t rows, int64_t tiles) { return rows * tiles_bytes(kind, tiles); }

/* The sizes of the structures that Python writes (library.py), in its order. */
EXPORT void specdec_sizes(int32_t sizes[11]) {
    const size_t own[] = {sizeof(LinearPart), sizeof(Linear), sizeof(Table), sizeof(Layer), sizeof(Model),
        sizeof(Sequence), sizeof(Call), sizeof(Stage), sizeof(Sampled), sizeof(Given), sizeof(TreeDraft)};
    for (int i = 0; i < 11; i++) sizes[i] = (int32_t)own[i];
}

/* Large pages. The translation of addresses of small pages takes a sixth of a pass in a virtual machine. */
enum { LARGE_PAGE = 2 << 20, SLOW = 4 }; /* SLOW: milliseconds to get a page that the system must make first, at least */

#ifdef MADV_HUGEPAGE
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
static double milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}
#endif

/* Put new memory that every pass will read on large pages, as long as the system has some. Returns 0 if it has none: two pages
 * in succession were slow. The others stay small. */
EXPORT int specdec_large_pages(void *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t end = (uintptr_t)memory + (uintptr_t)bytes;
    int slow = 0;
    for (uintptr_t at = ((uintptr_t)memory + LARGE_PAGE - 1) & -(uintptr_t)LARGE_PAGE; at + LARGE_PAGE <= end; at += LARGE_PAGE) {
        const double begun = milliseconds();
        if (madvise((void *)at, LARGE_PAGE, MADV_HUGEPAGE)) return 0;
        *(volatile uint8_t *)at = 0;
        slow = milliseconds() - begun > SLOW ? slow + 1 : 0;
        if (slow == 2) return 0;
    }
    return 1;
#else
    return 0;
#endif
}

/* Move the memory of a large page to one, which takes about 15 ms, unless nothing has been written to its beginning. Returns 0 if the
 * system cannot, now or at all. */
EXPORT int specdec_collapse(void *memory) {
#ifdef MADV_HUGEPAGE
    unsigned char there[LARGE_PAGE / 4096];
    if (mincore(memory, LARGE_PAGE, there) || !(there[0] & 1)) return 1;
    return !madvise(memory, LARGE_PAGE, MADV_HUGEPAGE) && !madvise(memory, LARGE_PAGE, MADV_COLLAPSE);
#else
    return 0;
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
