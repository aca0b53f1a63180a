/* Kernels one after the other, as tape.py has recorded them. */

#define _POSIX_C_SOURCE 199309L
#include <stdint.h>
#include <time.h>

typedef struct {
    int (*kernel)(void *task);
    int64_t *task;  /* which begins with its number of rows */
    double seconds; /* that it took the last time */
} Operation;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* Returns 0, or what the first kernel returns that fails. */
int apiary_play(Operation *operations, int64_t count, int64_t rows) {
    double begin = now();
    for (Operation *each = operations; each < operations + count; each++) {
        *each->task = rows;
        int failed = each->kernel(each->task);
        if (failed) return failed;
        double end = now();
        each->seconds = end - begin;
        begin = end;
    }
    return 0;
}
