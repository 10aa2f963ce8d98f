/* replay LIBRARY MOST FILE: repeats recorded calls of the native kernels (replay.py) with the kernels of a library, of instruction set
 * MOST at best, on the memory that they had, and compares each byte that they wrote. Prints the instruction set and the first
 * difference of each call; exits with 1 if there is one. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
    uint8_t *got, *expected;
    uint64_t bytes, width; /* width: of a number */
} Written;

typedef struct Recorded {
    const struct Recorded *next;
    const char *kernel, *title;
    const Written *written;
    uint64_t count, has_result;
    int64_t result;
    double number; /* the argument that is no whole number */
    int64_t arguments[11];
} Recorded;

static int differences;

static void compare(const Recorded *call, const Written *w) {
    for (uint64_t i = 0; i < w->bytes; i++)
        if (w->got[i] != w->expected[i]) {
            printf("%s, %s: number %lu of %lu differs\n", call->title, call->kernel, (unsigned long)(i / w->width), (unsigned long)(w->bytes / w->width));
            differences++;
            return;
        }
}

int main(int count, char **argument) {
    uint64_t size[2]; /* bytes of memory; pointers in it, which are numbers of bytes */
    dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL); /* which PyTorch would bring */
    void *library = dlopen(argument[1], RTLD_NOW | RTLD_GLOBAL);
    FILE *file = fopen(argument[3], "rb");
    if (!library || !file || fread(size, 8, 2, file) != 2) return fprintf(stderr, "%s\n", library ? argument[3] : dlerror()), 2;
    uint8_t *memory = aligned_alloc(4096, size[0]);
    uint64_t *pointers = malloc(8 * size[1]);
    if (!memory || !pointers || fread(memory, 1, size[0], file) != size[0] || fread(pointers, 8, size[1], file) != size[1]) return 2;
    for (uint64_t i = 0; i < size[1]; i++) *(uint64_t *)(memory + pointers[i]) += (uint64_t)memory;
    static const char *const levels[] = {LEVELS};
    int level = ((int (*)(int))dlsym(library, "specdec_open"))(atoi(argument[2]));
    printf("%s\n", levels[level]);
    for (const Recorded *call = *(const Recorded **)memory; level && call; call = call->next) {
        const int64_t *a = call->arguments;
        char name[64];
        snprintf(name, sizeof name, "%s_%s", call->kernel, levels[level]);
        int64_t (*kernel)(int64_t, int64_t, float, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t) = dlsym(library, name);
        int64_t result = kernel(a[0], a[1], (float)call->number, a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10]);
        if (call->has_result && (int32_t)result != (int32_t)call->result) printf("%s, %s: returns %ld, not %ld\n", call->title, name, (long)result, (long)call->result), differences++;
        for (uint64_t i = 0; i < call->count; i++) compare(call, call->written + i);
    }
    return differences > 0;
}
