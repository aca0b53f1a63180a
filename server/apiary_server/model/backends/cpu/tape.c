/* Kernels one after the other, each by a team of threads: all of them call it, share its loops (`omp for`, without
   waiting behind the last one), and wait for each other before the next. So a tape needs one team, not one a kernel. */

#define _POSIX_C_SOURCE 199309L
#include <stdint.h>
#include <time.h>

typedef struct {
    int (*kernel)(void *task); /* returns 0, or something else where a thread had no memory */
    int64_t *task;             /* which begins with its number of rows */
    double seconds;            /* that it took the last time */
} Operation;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* Returns 0, or 1 where a kernel failed, which is the last one then. A thread that has ever had a team keeps it (see
   threads.py): little work is better done `alone`. */
int apiary_play(Operation *operations, int64_t count, int64_t rows, int alone) {
    int64_t failed = count;
    for (Operation *each = operations; each < operations + count; each++) *each->task = rows;
#pragma omp parallel if (!alone)
    {
        double begin = now();
        for (int64_t i = 0, last; i < count; i++) {
            if (operations[i].kernel(operations[i].task)) {
#pragma omp atomic write
                failed = i;
            }
#pragma omp barrier
#pragma omp atomic read
            last = failed;
#pragma omp master
            {
                double end = now();
                operations[i].seconds = end - begin;
                begin = end;
            }
            if (last <= i) break; /* where it is later, others are at the next one already, and failed there */
        }
    }
    return failed < count;
}
