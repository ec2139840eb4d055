/* read(2), pread(2) and pwrite(2) of files below SLOW_FOLDER take SLOW_LATENCY_US and 1 us for each
   SLOW_BYTES_PER_US bytes, at least; a read(2) of less than 512 bytes does not.
   Loaded with LD_PRELOAD below DFTracer, whose trace then shows the slow calls. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

/* Returns `moved`, when a call on this file that began at `begun` and moved so many bytes may end. */
static ssize_t wait_for_storage(int file, ssize_t moved, double begun) {
    const char *folder = getenv("SLOW_FOLDER");
    if (moved <= 0 || !folder)
        return moved;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0 || strncmp(path, folder, strlen(folder)) != 0)
        return moved;
    double until = begun + atof(getenv("SLOW_LATENCY_US")) + moved / atof(getenv("SLOW_BYTES_PER_US"));
    double left = until - now_us();
    if (left > 0) {
        struct timespec pause = {(time_t)(left / 1e6), (long)((left - 1e6 * (long)(left / 1e6)) * 1e3)};
        nanosleep(&pause, NULL);
    }
    return moved;
}

ssize_t read(int file, void *into, size_t most) {
    static ssize_t (*next)(int, void *, size_t);
    if (!next)
        next = (ssize_t(*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    double begun = now_us();
    ssize_t got = next(file, into, most);
    return got < 512 ? got : wait_for_storage(file, got, begun);
}

#define AT_AN_OFFSET(NAME, BYTES)                                                              \
    ssize_t NAME(int file, BYTES *data, size_t most, off64_t offset) {                         \
        static ssize_t (*next)(int, BYTES *, size_t, off64_t);                                 \
        if (!next)                                                                             \
            next = (ssize_t(*)(int, BYTES *, size_t, off64_t))dlsym(RTLD_NEXT, #NAME);         \
        double begun = now_us();                                                               \
        return wait_for_storage(file, next(file, data, most, offset), begun);                  \
    }

AT_AN_OFFSET(pread64, void)
AT_AN_OFFSET(pwrite64, const void)
