/* read(2) of files below SLOW_FOLDER takes SLOW_LATENCY_US and 1 us for each SLOW_BYTES_PER_US bytes, at least.
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

ssize_t read(int file, void *into, size_t most) {
    static ssize_t (*next)(int, void *, size_t);
    if (!next)
        next = (ssize_t(*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    double begun = now_us();
    ssize_t got = next(file, into, most);
    const char *folder = getenv("SLOW_FOLDER");
    if (got < 512 || !folder)
        return got;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0 || strncmp(path, folder, strlen(folder)) != 0)
        return got;
    double until = begun + atof(getenv("SLOW_LATENCY_US")) + got / atof(getenv("SLOW_BYTES_PER_US"));
    double left = until - now_us();
    if (left > 0) {
        struct timespec pause = {(time_t)(left / 1e6), (long)((left - 1e6 * (long)(left / 1e6)) * 1e3)};
        nanosleep(&pause, NULL);
    }
    return got;
}
