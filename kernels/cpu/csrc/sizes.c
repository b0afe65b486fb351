/* The sizes of the structs that structs.py mirrors: cpu/native.py compares them when it loads the library. */
#include <string.h>

#include "choice.h"
#include "decoder_steps.h"
#include "dense.h"
#include "export.h"
#include "hash_embedding.h"
#include "selection.h"
#include "single_rows.h"
#include "stack.h"
#include "upstream.h"

#define SIZE(name) {#name, sizeof(struct name)}

static const struct {
    const char *name;
    int64_t size;
} sizes[] = {
    SIZE(call),    SIZE(choice),   SIZE(columns),   SIZE(latents), SIZE(layer),  SIZE(linear), SIZE(made), SIZE(module),
    SIZE(packed),  SIZE(pages),   SIZE(part),     SIZE(patches),   SIZE(places),  SIZE(pooling), SIZE(reader), SIZE(reading),
    SIZE(requests), SIZE(rule),    SIZE(selection), SIZE(sink),    SIZE(source), SIZE(spent),  SIZE(tables),
};

/* Bytes of a struct; -1 where there is none of this name. */
EXPORT int64_t fastblt_size_of(const char *name) {
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (!strcmp(sizes[i].name, name)) return sizes[i].size;
    return -1;
}
