/* Moving the entries that stay to the front, in their memory or in other. */

#include <stdint.h>
#include <string.h>

typedef struct {
    int64_t layers, heads, kept;
    int64_t bytes; /* of an entry */
    const char *source;
    int64_t source_layer, source_head; /* strides, bytes */
    char *target;                      /* the same memory, or some that does not overlap it */
    int64_t target_layer, target_head;
    const int64_t *index; /* [layers, heads, kept], contiguous: which stay, ascending */
} Keep;

void apiary_keep(const Keep *task) {
#pragma omp parallel for collapse(2)
    for (int64_t layer = 0; layer < task->layers; layer++)
        for (int64_t head = 0; head < task->heads; head++) {
            const char *source = task->source + layer * task->source_layer + head * task->source_head;
            char *target = task->target + layer * task->target_layer + head * task->target_head;
            const int64_t *index = task->index + (layer * task->heads + head) * task->kept;
            for (int64_t first = 0, end; first < task->kept; first = end) {
                for (end = first + 1; end < task->kept && index[end] == index[end - 1] + 1; end++) {}
                const char *from = source + index[first] * task->bytes;
                char *to = target + first * task->bytes;
                if (to != from) memmove(to, from, (end - first) * task->bytes);
            }
        }
}
