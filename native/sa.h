/*
 * sa.h - what C code includes: api.h with the preprocessor's part around it, and helpers shared by the native core.
 * It declares nothing that is not in api.h to Python.
 */
#ifndef SA_H
#define SA_H

#include <stddef.h>
#include <stdint.h>

#pragma GCC visibility push(default)
#include "api.h"
#pragma GCC visibility pop

#define SA_NONE UINT32_MAX /* no slot, no page */

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed columns are little-endian");
_Static_assert(sizeof(struct sa_run) == 12, "a run is three packed uint32");

/* map.c, for gntdev.c. Every run has pages, and all of them lie in the mapping: else -EINVAL, -ERANGE. */
int sa_check_runs(const void *base, uint64_t npages, const struct sa_run *runs, size_t nruns);
/* Sets the mappings aside that let sa_map_file work at vm.max_map_count; done already is fine. */
int sa_map_reserve(void);

#endif
