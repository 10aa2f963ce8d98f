/* The team's barrier: spin, then sleep. */
#include "native.h"
#ifdef SPECDEC_NATIVE
#ifdef __linux__
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

static void sleep_in(int32_t *phase, int32_t now) { syscall(SYS_futex, phase, FUTEX_WAIT_PRIVATE, now, NULL, NULL, 0); }
static void wake_from(int32_t *phase) { syscall(SYS_futex, phase, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0); }
#else
#include <sched.h>

static void sleep_in(int32_t *phase, int32_t now) { sched_yield(); }
static void wake_from(int32_t *phase) {}
#endif

#ifdef __aarch64__
#define PAUSE() __asm__ volatile("isb") /* longer than "yield", which many cores ignore */
#else
#define PAUSE() __builtin_ia32_pause()
#endif

enum { SPINS = 1000 }; /* 20 to 50 microseconds: a thread that takes longer has lost its core */

/* Spin, and then sleep, which gives the core to the others. */
void wait_for_team(Barrier *b, int n) {
    int32_t phase = __atomic_load_n(&b->phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&b->waiting, 1, __ATOMIC_ACQ_REL) == n) {
        __atomic_store_n(&b->waiting, 0, __ATOMIC_RELAXED);
        for (int i = 0; i < n && i < MOST_SHARING; i++) __atomic_store_n(&b->taken[i].items, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&b->phase, phase + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&b->asleep, __ATOMIC_SEQ_CST)) wake_from(&b->phase);
        return;
    }
    for (int spins = 0; spins < SPINS; spins++) {
        if (__atomic_load_n(&b->phase, __ATOMIC_ACQUIRE) != phase) return;
        PAUSE();
    }
    /* The thread that ends the phase sees us in `asleep`, or the system call sees that the phase has ended. */
    __atomic_add_fetch(&b->asleep, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&b->phase, __ATOMIC_SEQ_CST) == phase) sleep_in(&b->phase, phase);
    __atomic_sub_fetch(&b->asleep, 1, __ATOMIC_RELAXED);
}
#endif
