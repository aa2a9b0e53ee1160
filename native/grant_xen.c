/*
 * grant_xen.c - the dom0 half of the Xen backend: the frames of an area domain and the entries of its grant table.
 *
 * An area domain is made and destroyed by the toolstack (sharearea/area/toolstack.py) and never runs. Here its guest
 * frames are populated, filled, checked and given back, and read-only grant entries for many guests are written onto
 * them. Which slot, which reference and which guest is the engine's business.
 *
 * Xen's libraries are opened at run time, so that this builds, installs and loads where there is no Xen. Only such
 * with a stable ABI are used: libxenforeignmemory.so.1 (maps frames and the table) and libxencall.so.1 (four commands
 * of two hypercalls that are part of Xen's public ABI). What was seen of them is said where it matters; all of it on
 * Xen 4.17 with a PV dom0.
 *
 * Who can write what: an area domain has no code that runs, so its table is written here and by Xen, which turns the
 * "in use" bits of an entry when a guest maps or unmaps it. A guest decides only when; that is what is UNTRUSTED.
 */
#include "sa.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ------------------------------------------------------------------------------------------------------ entries */

/* xen/include/public/grant_table.h */
enum {
	GTF_PERMIT_ACCESS = 1,
	GTF_READONLY = 1 << 2,
	GTF_READING = 1 << 3,
	GTF_WRITING = 1 << 4,
	GTF_IN_USE = GTF_READING | GTF_WRITING,
	DOMID_FIRST_RESERVED = 0x7ff0
};

/* A revocation loses against a guest that maps and unmaps at the same moment; a guest must not be able to make it last
 * for ever. */
enum { REVOKE_TRIES = 8 };

struct entry {
	_Atomic(uint16_t) flags;
	_Atomic(uint16_t) domid;
	_Atomic(uint32_t) frame;
};

_Static_assert(sizeof(struct entry) == 8 && ATOMIC_SHORT_LOCK_FREE == 2, "a grant entry is memory shared with Xen");

static struct entry *entry_at(void *const *chunks, uint32_t ref)
{
	return (struct entry *)chunks[ref / SA_GRANT_CHUNK] + ref % SA_GRANT_CHUNK;
}

static int check_refs(size_t nentries, const uint32_t *refs, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		if (refs[i] < SA_GRANT_FIRST)
			return -EINVAL;
		if (refs[i] >= nentries)
			return -ERANGE;
	}
	return 0;
}

/* 0 if no reference comes twice. */
static int check_distinct(size_t nentries, const uint32_t *refs, size_t n)
{
	uint8_t *seen = calloc(nentries / 8 + 1, 1);
	int error = 0;

	if (seen == NULL)
		return -ENOMEM;
	for (size_t i = 0; i < n && !error; i++) {
		const uint8_t bit = (uint8_t)(1U << (refs[i] % 8));

		if (seen[refs[i] / 8] & bit)
			error = -EINVAL;
		seen[refs[i] / 8] |= bit;
	}
	free(seen);
	return error;
}

int sa_grants_write(void *const *chunks, size_t nentries, uint32_t domid, const uint32_t *frames, const uint32_t *refs,
                    size_t n)
{
	int error;

	if (domid >= DOMID_FIRST_RESERVED)
		return -EINVAL;
	error = check_refs(nentries, refs, n);
	if (error)
		return error;
	error = check_distinct(nentries, refs, n);
	if (error)
		return error;
	/* An entry that is free stays free: Xen turns bits of entries that permit access only. */
	for (size_t i = 0; i < n; i++) {
		if (atomic_load_explicit(&entry_at(chunks, refs[i])->flags, memory_order_acquire) != 0)
			return -EBUSY;
	}
	for (size_t i = 0; i < n; i++) {
		struct entry *entry = entry_at(chunks, refs[i]);

		atomic_store_explicit(&entry->frame, frames[i], memory_order_relaxed);
		atomic_store_explicit(&entry->domid, (uint16_t)domid, memory_order_relaxed);
		/* Xen may look at any moment: it must not see the flags before the rest. */
		atomic_store_explicit(&entry->flags, GTF_PERMIT_ACCESS | GTF_READONLY, memory_order_release);
	}
	return 0;
}

/* Whether the entry is free now. */
static bool entry_revoke(struct entry *entry)
{
	/* UNTRUSTED: Xen sets and clears GTF_READING when the guest says so. */
	uint16_t flags = atomic_load_explicit(&entry->flags, memory_order_acquire);

	for (int i = 0; i < REVOKE_TRIES; i++) {
		if (flags == 0)
			return true;
		if (flags & GTF_IN_USE)
			return false;
		/* Never a plain store: one over a bit that Xen has just set would leave a mapping that nothing shows (seen:
		 * the guest reads on, and can map the reference again). Xen sets the bit by compare-and-swap of flags and
		 * domid together, so one of the two sees the other. */
		if (atomic_compare_exchange_strong_explicit(&entry->flags, &flags, 0, memory_order_acq_rel,
		                                            memory_order_acquire))
			return true;
	}
	return false;
}

int sa_grants_revoke(void *const *chunks, size_t nentries, const uint32_t *refs, size_t n, uint8_t *ret_busy)
{
	const int error = check_refs(nentries, refs, n);

	if (error)
		return error;
	for (size_t i = 0; i < n; i++)
		ret_busy[i] = !entry_revoke(entry_at(chunks, refs[i]));
	return 0;
}

int sa_grants_list(void *const *chunks, size_t nentries, size_t max, uint32_t *ret_refs, uint32_t *ret_domids,
                   uint32_t *ret_frames, size_t *ret_n)
{
	size_t n = 0;

	for (size_t ref = SA_GRANT_FIRST; ref < nentries; ref++) {
		struct entry *entry = entry_at(chunks, (uint32_t)ref);

		if (atomic_load_explicit(&entry->flags, memory_order_acquire) == 0)
			continue;
		if (n < max) {
			ret_refs[n] = (uint32_t)ref;
			ret_domids[n] = atomic_load_explicit(&entry->domid, memory_order_relaxed);
			ret_frames[n] = atomic_load_explicit(&entry->frame, memory_order_relaxed);
		}
		n++;
	}
	*ret_n = n;
	return 0;
}

/* ---------------------------------------------------------------------------------------------- Xen's libraries */

typedef struct xenforeignmemory_handle memory_handle;
typedef struct xenforeignmemory_resource_handle resource_handle;
typedef struct xencall_handle call_handle;

/* xenforeignmemory.h and xencall.h; a xen_pfn_t is an unsigned long. */
struct libraries {
	void *memory;
	void *call;
	memory_handle *(*memory_open)(void *logger, unsigned flags);
	int (*memory_close)(memory_handle *handle);
	void *(*map)(memory_handle *handle, uint32_t domid, int protection, size_t pages, const unsigned long *frames,
	             int *errors);
	int (*unmap)(memory_handle *handle, void *at, size_t pages);
	resource_handle *(*map_resource)(memory_handle *handle, uint16_t domid, unsigned type, unsigned id,
	                                 unsigned long frame, unsigned long frames, void **at, int protection,
	                                 int flags);
	int (*unmap_resource)(memory_handle *handle, resource_handle *resource);
	call_handle *(*call_open)(void *logger, unsigned flags);
	int (*call_close)(call_handle *handle);
	int (*call2)(call_handle *handle, unsigned op, uint64_t one, uint64_t two);
	int (*call3)(call_handle *handle, unsigned op, uint64_t one, uint64_t two, uint64_t three);
	void *(*buffer_alloc)(call_handle *handle, size_t size);
	void (*buffer_free)(call_handle *handle, void *buffer);
};

_Static_assert(sizeof(unsigned long) == 8, "frame numbers have 64 bits");

/* A function's address out of a library; POSIX has data pointers hold it. */
static int load(void *library, const char *name, void *ret_function)
{
	void *found = dlsym(library, name);

	if (found == NULL)
		return -ELIBACC;
	memcpy(ret_function, &found, sizeof found);
	return 0;
}

static int libraries_open(struct libraries *libraries)
{
	const struct {
		bool call;
		const char *name;
		void *function;
	} wanted[] = {
		{false, "xenforeignmemory_open", &libraries->memory_open},
		{false, "xenforeignmemory_close", &libraries->memory_close},
		{false, "xenforeignmemory_map", &libraries->map},
		{false, "xenforeignmemory_unmap", &libraries->unmap},
		{false, "xenforeignmemory_map_resource", &libraries->map_resource},
		{false, "xenforeignmemory_unmap_resource", &libraries->unmap_resource},
		{true, "xencall_open", &libraries->call_open},
		{true, "xencall_close", &libraries->call_close},
		{true, "xencall2", &libraries->call2},
		{true, "xencall3", &libraries->call3},
		{true, "xencall_alloc_buffer", &libraries->buffer_alloc},
		{true, "xencall_free_buffer", &libraries->buffer_free},
	};

	libraries->memory = dlopen("libxenforeignmemory.so.1", RTLD_NOW | RTLD_LOCAL);
	libraries->call = dlopen("libxencall.so.1", RTLD_NOW | RTLD_LOCAL);
	if (libraries->memory == NULL || libraries->call == NULL)
		return -ELIBACC;
	for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
		const int error =
			load(wanted[i].call ? libraries->call : libraries->memory, wanted[i].name, wanted[i].function);

		if (error)
			return error;
	}
	return 0;
}

static void libraries_close(struct libraries *libraries)
{
	/* dlclose fails for what is not open only. */
	if (libraries->call)
		(void)dlclose(libraries->call);
	if (libraries->memory)
		(void)dlclose(libraries->memory);
}

/* ------------------------------------------------------------------------------------------- opening and closing */

enum {
	/* xen/include/public/xen.h, memory.h, grant_table.h */
	HYPERVISOR_MEMORY_OP = 12,
	MEMORY_DECREASE_RESERVATION = 1,
	MEMORY_CURRENT_RESERVATION = 3,
	MEMORY_MAXIMUM_RESERVATION = 4,
	MEMORY_POPULATE_PHYSMAP = 6,
	MEMORY_MAXIMUM_GPFN = 14,
	HYPERVISOR_GRANT_TABLE_OP = 20,
	GRANT_QUERY_SIZE = 6,
	RESOURCE_GRANT_TABLE = 1,
	RESOURCE_GRANT_TABLE_SHARED = 0,

	EXTENT_ORDER = 9, /* 2 MiB */
	EXTENT_PAGES = 1 << EXTENT_ORDER,
	EXTENTS_PER_CALL = 1024,
	ENTRIES_PER_FRAME = SA_PAGE_SIZE / (int)sizeof(struct entry),
	/* Frames of a table that are mapped in one go: the most that Xen before 4.15 takes. */
	CHUNK_FRAMES = SA_GRANT_CHUNK / ENTRIES_PER_FRAME,
	MAP_PAGES = 2048, /* frames of the area that are mapped at a time, see area_walk */
	HASH_PAGES = 32,  /* 1 KiB of fingerprints on the stack */
	/* Where the toolstack puts the stub (area_stub.lds): a frame that a living area domain always has. */
	STUB_FRAME = 0x100
};

_Static_assert(CHUNK_FRAMES == 32, "a chunk is 32 grant frames");

struct reservation {
	uint64_t extents; /* address of the array */
	uint64_t count;
	uint32_t order;
	uint32_t flags;
	uint16_t domid;
};

struct query_size {
	uint16_t domid;
	uint32_t frames;
	uint32_t max_frames;
	int16_t status;
};

_Static_assert(sizeof(struct reservation) == 32 && sizeof(struct query_size) == 16, "layouts of Xen's public ABI");

/* What hypercalls read and write must not be swapped or moved meanwhile: it comes from libxencall, once. */
struct arguments {
	union {
		struct reservation reservation;
		struct query_size query;
		uint16_t domid;
	};
	uint64_t extents[EXTENTS_PER_CALL];
};

struct sa_area {
	struct libraries xen;
	memory_handle *memory;
	call_handle *call;
	struct arguments *arguments;
	uint64_t base;
	uint32_t domid;
	uint32_t frames;     /* of the table, mapped here */
	uint32_t max_frames; /* it may grow to */
	uint32_t max_chunks;
	uint32_t nchunks;
	void **chunks;               /* max_chunks, nchunks of them mapped */
	resource_handle **resources; /* of the same length: what unmaps a chunk */
};

static void area_drop(sa_area **area)
{
	sa_area_close(*area);
}

#define AREA_SCOPE __attribute__((cleanup(area_drop))) sa_area *

static sa_area *area_keep(sa_area **area)
{
	sa_area *kept = *area;

	*area = NULL;
	return kept;
}

/* What a call of Xen's libraries that failed left in errno; they promise that there is something. */
static int failed(void)
{
	return errno > 0 ? -errno : -EIO;
}

/* A hypercall of one number about the domain; returns -errno or the number. */
static int area_ask(sa_area *area, unsigned command)
{
	int answer;

	area->arguments->domid = (uint16_t)area->domid;
	answer = area->xen.call2(area->call, HYPERVISOR_MEMORY_OP, command, (uintptr_t)area->arguments);
	return answer < 0 ? failed() : answer;
}

static int area_query(sa_area *area, uint32_t *ret_frames, uint32_t *ret_max)
{
	struct query_size *query = &area->arguments->query;

	*query = (struct query_size){.domid = (uint16_t)area->domid};
	if (area->xen.call3(area->call, HYPERVISOR_GRANT_TABLE_OP, GRANT_QUERY_SIZE, (uintptr_t)query, 1) < 0)
		return failed();
	if (query->status != 0)
		return -ESRCH; /* GNTST_bad_domain: the only one that a caller with our rights gets */
	*ret_frames = query->frames;
	*ret_max = query->max_frames;
	return 0;
}

/* Map the table up to `frames` frames; Xen makes the table longer where it has fewer (xen/common/memory.c,
 * acquire_grant_table). A chunk that is mapped in part is mapped anew, before the old mapping goes. */
static int table_map(sa_area *area, uint32_t frames)
{
	while (area->frames < frames) {
		const uint32_t chunk = area->frames / CHUNK_FRAMES;
		const uint32_t start = chunk * CHUNK_FRAMES;
		const uint32_t length = frames - start < CHUNK_FRAMES ? frames - start : CHUNK_FRAMES;
		void *at = NULL;
		resource_handle *resource = area->xen.map_resource(area->memory, (uint16_t)area->domid,
		                                                   RESOURCE_GRANT_TABLE, RESOURCE_GRANT_TABLE_SHARED,
		                                                   start, length, &at, PROT_READ | PROT_WRITE, 0);

		if (resource == NULL)
			return failed();
		if (area->resources[chunk] && area->xen.unmap_resource(area->memory, area->resources[chunk]) < 0) {
			const int error = failed();

			(void)area->xen.unmap_resource(area->memory, resource);
			return error;
		}
		area->resources[chunk] = resource;
		area->chunks[chunk] = at;
		area->nchunks = chunk + 1;
		area->frames = start + length;
	}
	return 0;
}

int sa_area_open(uint32_t domid, uint64_t base, sa_area **ret)
{
	AREA_SCOPE area = NULL;
	uint32_t frames = 0;
	int error;

	*ret = NULL;
	/* Version 1 entries have 32 bits for a frame. */
	if (domid == 0 || domid >= DOMID_FIRST_RESERVED || base % EXTENT_PAGES != 0 || base > UINT32_MAX)
		return -EINVAL;
	area = calloc(1, sizeof *area);
	if (area == NULL)
		return -ENOMEM;
	area->domid = domid;
	area->base = base;
	error = libraries_open(&area->xen);
	if (error)
		return error;
	area->memory = area->xen.memory_open(NULL, 0);
	if (area->memory == NULL)
		return failed();
	area->call = area->xen.call_open(NULL, 0);
	if (area->call == NULL)
		return failed();
	area->arguments = area->xen.buffer_alloc(area->call, sizeof *area->arguments);
	if (area->arguments == NULL)
		return -ENOMEM;
	error = area_query(area, &frames, &area->max_frames);
	if (error)
		return error;
	if (frames == 0 || frames > area->max_frames || area->max_frames > UINT32_MAX / ENTRIES_PER_FRAME)
		return -EPROTO;
	area->max_chunks = (area->max_frames + CHUNK_FRAMES - 1) / CHUNK_FRAMES;
	area->chunks = calloc(area->max_chunks, sizeof *area->chunks);
	area->resources = calloc(area->max_chunks, sizeof(resource_handle *));
	if (area->chunks == NULL || area->resources == NULL)
		return -ENOMEM;
	/* All of it, at once: what an earlier broker wrote is found, and, as Xen keeps a domain that has a page mapped, the
	 * domid cannot become another domain's as long as this is open. */
	error = table_map(area, frames);
	if (error)
		return error;
	*ret = area_keep(&area);
	return 0;
}

void sa_area_close(sa_area *area)
{
	if (area == NULL)
		return;
	/* Each of these gives back what this process has and can fail in no other way than not having had it. */
	for (uint32_t i = 0; i < area->nchunks; i++)
		(void)area->xen.unmap_resource(area->memory, area->resources[i]);
	free(area->resources);
	free(area->chunks);
	if (area->arguments)
		area->xen.buffer_free(area->call, area->arguments);
	if (area->call)
		(void)area->xen.call_close(area->call);
	if (area->memory)
		(void)area->xen.memory_close(area->memory);
	libraries_close(&area->xen);
	free(area);
}

/* ----------------------------------------------------------------------------------------------------- mapping */

/* Frames mapped into this process for a moment. */
struct window {
	sa_area *area;
	uint8_t *at; /* NULL: nothing mapped */
	size_t pages;
	unsigned long *frames;
	int *errors; /* 0 where the frame is there */
};

static void window_drop(struct window *window)
{
	if (window->at)
		(void)window->area->xen.unmap(window->area->memory, window->at, window->pages);
	free(window->frames);
	free(window->errors);
}

#define WINDOW_SCOPE __attribute__((cleanup(window_drop))) struct window

static int window_prepare(struct window *window, sa_area *area, size_t pages)
{
	*window = (struct window){.area = area, .pages = pages};
	window->frames = calloc(pages, sizeof *window->frames);
	window->errors = calloc(pages, sizeof *window->errors);
	return window->frames && window->errors ? 0 : -ENOMEM;
}

/* Map window->frames. A frame that is not there leaves a hole that must not be touched, and its error. */
static int window_map(struct window *window, int protection)
{
	sa_area *area = window->area;

	window->at =
		area->xen.map(area->memory, area->domid, protection, window->pages, window->frames, window->errors);
	return window->at ? 0 : failed();
}

static void window_slots(struct window *window, uint32_t first)
{
	for (size_t i = 0; i < window->pages; i++)
		window->frames[i] = window->area->base + first + i;
}

/* 1: the frame was mapped. 0: the domain has none there, or is gone (EINVAL and ESRCH, seen; ENOENT: paged out, which no
 * area is). Else why it could not be mapped, -errno. The library has such errors negative. */
static int window_has(const struct window *window, size_t i)
{
	const int error = window->errors[i] < 0 ? window->errors[i] : -window->errors[i];

	if (error == 0)
		return 1;
	return error == -EINVAL || error == -ESRCH || error == -ENOENT ? 0 : error;
}

static int window_complete(const struct window *window)
{
	for (size_t i = 0; i < window->pages; i++) {
		const int has = window_has(window, i);

		if (has <= 0)
			return has < 0 ? has : -ENXIO;
	}
	return 0;
}

/* A grant entry has 32 bits for a frame. */
static int check_slots(const sa_area *area, uint32_t first, uint32_t n)
{
	return area->base + first + n > (uint64_t)UINT32_MAX ? -ERANGE : 0;
}

int sa_area_alive(sa_area *area, int *ret_alive)
{
	WINDOW_SCOPE window;
	int error = window_prepare(&window, area, 1);

	*ret_alive = 0;
	if (error)
		return error;
	/* Xen answers questions about a domain that dies, but it has no memory any more (seen). */
	window.frames[0] = STUB_FRAME;
	error = window_map(&window, PROT_READ);
	if (error == -ESRCH)
		return 0;
	if (error)
		return error;
	error = window_has(&window, 0);
	*ret_alive = error == 1;
	return error < 0 ? error : 0;
}

int sa_area_memory(sa_area *area, uint64_t *ret_pages)
{
	const int pages = area_ask(area, MEMORY_CURRENT_RESERVATION);

	if (pages < 0)
		return pages;
	*ret_pages = (uint64_t)pages;
	return 0;
}

int sa_area_end(sa_area *area, uint32_t *ret_end)
{
	const int last = area_ask(area, MEMORY_MAXIMUM_GPFN);
	uint64_t end;

	/* A number that does not fit comes back as another one, or negative (libxencall takes the answer as an int). */
	if (last < 0)
		return -EOVERFLOW;
	end = (uint64_t)last < area->base ? 0 : (uint64_t)last + 1 - area->base;
	*ret_end = (uint32_t)((end + EXTENT_PAGES - 1) / EXTENT_PAGES * EXTENT_PAGES);
	return 0;
}

int sa_area_blocks(sa_area *area, uint32_t nblocks, uint8_t *ret_there)
{
	int error = nblocks > UINT32_MAX / EXTENT_PAGES ? -ERANGE : check_slots(area, 0, nblocks * EXTENT_PAGES);

	for (uint32_t at = 0; at < nblocks && !error;) {
		const uint32_t step = nblocks - at < MAP_PAGES ? nblocks - at : MAP_PAGES;
		WINDOW_SCOPE window;

		error = window_prepare(&window, area, step);
		if (error)
			return error;
		for (uint32_t i = 0; i < step; i++)
			window.frames[i] = area->base + (uint64_t)(at + i + 1) * EXTENT_PAGES - 1;
		error = window_map(&window, PROT_READ);
		for (uint32_t i = 0; i < step && !error; i++) {
			const int has = window_has(&window, i);

			ret_there[at + i] = has == 1;
			error = has < 0 ? has : 0;
		}
		at += step;
	}
	return error;
}

int sa_area_present(sa_area *area, uint32_t first, uint32_t n, uint8_t *ret_present)
{
	int error = check_slots(area, first, n);

	for (uint32_t at = 0; at < n && !error;) {
		const uint32_t step = n - at < MAP_PAGES ? n - at : MAP_PAGES;
		WINDOW_SCOPE window;

		error = window_prepare(&window, area, step);
		if (error)
			return error;
		window_slots(&window, first + at);
		error = window_map(&window, PROT_READ);
		for (uint32_t i = 0; i < step && !error; i++) {
			const int has = window_has(&window, i);

			ret_present[at + i] = has == 1;
			error = has < 0 ? has : 0;
		}
		at += step;
	}
	return error;
}

/* Compare mapped pages, one after the other at pages, with the fingerprints wanted. */
static int compare(const uint8_t *key, const uint8_t *pages, size_t npages, const uint8_t *want, uint8_t *ret_ok)
{
	uint8_t fps[HASH_PAGES * SA_FP_SIZE];

	for (size_t at = 0; at < npages;) {
		const size_t n = npages - at < HASH_PAGES ? npages - at : HASH_PAGES;
		const int error = sa_fingerprint_pages(key, pages + at * SA_PAGE_SIZE, n, fps, NULL);

		if (error)
			return error;
		for (size_t i = 0; i < n; i++, at++)
			ret_ok[at] = memcmp(fps + i * SA_FP_SIZE, want + at * SA_FP_SIZE, SA_FP_SIZE) == 0;
	}
	return 0;
}

int sa_area_fill(sa_area *area, const uint8_t *key, uint32_t first, uint32_t npages, const uint8_t *pages,
                 const uint8_t *want, uint8_t *ret_ok)
{
	int error = check_slots(area, first, npages);

	for (uint32_t at = 0; at < npages && !error;) {
		const uint32_t step = npages - at < MAP_PAGES ? npages - at : MAP_PAGES;
		WINDOW_SCOPE window;

		error = window_prepare(&window, area, step);
		if (error)
			return error;
		window_slots(&window, first + at);
		error = window_map(&window, PROT_READ | PROT_WRITE);
		if (!error)
			error = window_complete(&window);
		if (error)
			return error;
		memcpy(window.at, pages + (size_t)at * SA_PAGE_SIZE, (size_t)step * SA_PAGE_SIZE);
		error = compare(key, window.at, step, want + (size_t)at * SA_FP_SIZE, ret_ok + at);
		at += step;
	}
	return error;
}

int sa_area_verify(sa_area *area, const uint8_t *key, uint32_t first, uint32_t npages, const uint8_t *want,
                   uint8_t *ret_ok)
{
	int error = check_slots(area, first, npages);

	if (npages)
		memset(ret_ok, 0, npages);
	for (uint32_t at = 0; at < npages && !error;) {
		const uint32_t step = npages - at < MAP_PAGES ? npages - at : MAP_PAGES;
		WINDOW_SCOPE window;

		error = window_prepare(&window, area, step);
		if (error)
			return error;
		window_slots(&window, first + at);
		error = window_map(&window, PROT_READ);
		for (uint32_t i = 0; i < step && !error;) {
			uint32_t end = i;

			/* Only what is there is looked at: a hole in the window is a SIGBUS. */
			while (end < step && window.errors[end] == 0)
				end++;
			error = compare(key, window.at + (size_t)i * SA_PAGE_SIZE, end - i,
			                want + (size_t)(at + i) * SA_FP_SIZE, ret_ok + at + i);
			i = end + 1;
		}
		at += step;
	}
	return error;
}

int sa_area_read(sa_area *area, const uint32_t *slots, size_t n, uint8_t *ret_pages)
{
	int error = 0;

	for (size_t at = 0; at < n && !error;) {
		const size_t step = n - at < MAP_PAGES ? n - at : MAP_PAGES;
		WINDOW_SCOPE window;

		error = window_prepare(&window, area, step);
		for (size_t i = 0; i < step && !error; i++) {
			error = check_slots(area, slots[at + i], 1);
			window.frames[i] = area->base + slots[at + i];
		}
		if (!error)
			error = window_map(&window, PROT_READ);
		if (!error)
			error = window_complete(&window);
		if (error)
			return error;
		memcpy(ret_pages + at * SA_PAGE_SIZE, window.at, step * SA_PAGE_SIZE);
		at += step;
	}
	return error;
}

/* ------------------------------------------------------------------------------------------------------ memory */

/* Populate or release the `count` extents in arguments->extents. Returns how many were done, or -errno. */
static int area_reserve(sa_area *area, unsigned command, uint32_t order, uint32_t count)
{
	int done;

	area->arguments->reservation = (struct reservation){.extents = (uintptr_t)area->arguments->extents,
	                                                    .count = count,
	                                                    .order = order,
	                                                    .domid = (uint16_t)area->domid};
	done = area->xen.call2(area->call, HYPERVISOR_MEMORY_OP, command, (uintptr_t)area->arguments);
	return done < 0 ? failed() : done;
}

/* Populate slots [first, first + *left) from the end downwards in extents of 2^order pages, as far as Xen has them, and
 * take them off *left.
 *
 * Downwards because Xen hands extents out in descending order: filled this way 2,047 of 2,047 neighbours were machine
 * neighbours with 2 MiB extents, 2,046 with 4 KiB ones; filled upwards 2,044 and 0 (seen). And so that the last page of
 * 2 MiB is the first that comes and, in area_release_block, the last that goes: sa_area_populate's caller that died. */
static int populate_down(sa_area *area, uint32_t first, uint32_t order, uint32_t *left)
{
	const uint32_t pages = 1U << order;

	while (*left >= pages) {
		const uint32_t fit = *left / pages;
		const uint32_t count = fit < EXTENTS_PER_CALL ? fit : EXTENTS_PER_CALL;
		int done;

		for (uint32_t i = 0; i < count; i++)
			area->arguments->extents[i] = area->base + first + *left - (uint64_t)(i + 1) * pages;
		done = area_reserve(area, MEMORY_POPULATE_PHYSMAP, order, count);
		if (done < 0)
			return done;
		if ((uint32_t)done > count)
			return -EPROTO;
		*left -= (uint32_t)done * pages;
		if ((uint32_t)done < count)
			return 0;
	}
	return 0;
}

int sa_area_populate(sa_area *area, uint32_t first, uint32_t n)
{
	uint32_t left = n;
	int max;
	int now;
	int error = check_slots(area, first, n);

	if (error)
		return error;
	if (first % EXTENT_PAGES != 0 || n % EXTENT_PAGES != 0)
		return -EINVAL;
	/* A frame that is there already would be replaced, and the old one stay with the domain, nameless (seen). */
	error = sa_area_release(area, first, n);
	if (error)
		return error;
	now = area_ask(area, MEMORY_CURRENT_RESERVATION);
	max = area_ask(area, MEMORY_MAXIMUM_RESERVATION);
	if (now < 0 || max < 0)
		return now < 0 ? now : max;
	if ((uint64_t)now + n > (uint64_t)max)
		return -EDQUOT;
	error = populate_down(area, first, EXTENT_ORDER, &left);
	if (!error)
		error = populate_down(area, first, 0, &left);
	if (!error && left == 0)
		return 0;
	now = sa_area_release(area, first, n);
	if (now < 0)
		return now;
	return error ? error : -ENOMEM;
}

/* 0 if all of them went; 1 if Xen stopped before the end. */
static int area_release_some(sa_area *area, uint32_t order, uint32_t count)
{
	const int done = count ? area_reserve(area, MEMORY_DECREASE_RESERVATION, order, count) : 0;

	if (done < 0)
		return done;
	return (uint32_t)done < count;
}

/* At most 2 MiB, of one aligned block. */
static int area_release_block(sa_area *area, uint32_t first, uint32_t n)
{
	uint8_t present[EXTENT_PAGES];
	uint64_t *extents = area->arguments->extents;
	uint32_t count = 0;
	int left = sa_area_present(area, first, n, present);

	if (left)
		return left;
	for (uint32_t i = 0; i < n; i++) {
		if (present[i])
			extents[count++] = area->base + first + i;
	}
	/* In one piece it is a fraction of the work, but Xen stops inside an extent at the first page that is not there, with
	 * those before it gone (seen): only where all are there. And it takes no pieces at all of a dom0 whose
	 * memop-max-order says so. */
	if (count == EXTENT_PAGES) {
		left = area_release_some(area, EXTENT_ORDER, 1);
		if (left <= 0)
			return left;
	}
	left = area_release_some(area, 0, count);
	/* All of them were there a moment ago, and nobody else takes them. */
	return left > 0 ? -EIO : left;
}

int sa_area_release(sa_area *area, uint32_t first, uint32_t n)
{
	int error = check_slots(area, first, n);

	for (uint32_t at = 0; at < n && !error;) {
		const uint32_t left = EXTENT_PAGES - (first + at) % EXTENT_PAGES;
		const uint32_t step = n - at < left ? n - at : left;

		error = area_release_block(area, first + at, step);
		at += step;
	}
	return error;
}

/* ------------------------------------------------------------------------------------------------------ grants */

int sa_area_table(sa_area *area, uint32_t *ret_frames, uint32_t *ret_max)
{
	*ret_frames = area->frames;
	*ret_max = area->max_frames;
	return 0;
}

static size_t table_entries(const sa_area *area)
{
	return (size_t)area->frames * ENTRIES_PER_FRAME;
}

int sa_area_grant(sa_area *area, uint32_t domid, const uint32_t *slots, const uint32_t *refs, size_t n)
{
	uint32_t *frames;
	uint32_t last = 0;
	int error = 0;

	if (n == 0)
		return 0;
	if (domid == area->domid)
		return -EINVAL;
	for (size_t i = 0; i < n; i++)
		last = refs[i] > last ? refs[i] : last;
	if (last / ENTRIES_PER_FRAME >= area->max_frames)
		return -ENOSPC;
	if (last >= table_entries(area)) {
		/* By whole chunks, so that a table does not grow frame by frame. */
		const uint32_t chunks = last / SA_GRANT_CHUNK + 1;
		const uint32_t wanted = chunks * CHUNK_FRAMES;

		error = table_map(area, wanted < area->max_frames ? wanted : area->max_frames);
		if (error)
			return error;
	}
	frames = malloc(n * sizeof *frames);
	if (frames == NULL)
		return -ENOMEM;
	for (size_t i = 0; i < n && !error; i++) {
		error = check_slots(area, slots[i], 1);
		frames[i] = (uint32_t)(area->base + slots[i]);
	}
	if (!error)
		error = sa_grants_write(area->chunks, table_entries(area), domid, frames, refs, n);
	free(frames);
	return error;
}

int sa_area_revoke(sa_area *area, const uint32_t *refs, size_t n, uint8_t *ret_busy)
{
	const size_t entries = table_entries(area);
	const size_t most = (size_t)area->max_frames * ENTRIES_PER_FRAME;

	for (size_t i = 0; i < n; i++) {
		if (refs[i] < SA_GRANT_FIRST)
			return -EINVAL;
		if (refs[i] >= most)
			return -ERANGE;
	}
	/* What lies behind the table's end was never written. */
	for (size_t i = 0; i < n; i++)
		ret_busy[i] = refs[i] < entries && !entry_revoke(entry_at(area->chunks, refs[i]));
	return 0;
}

int sa_area_entries(sa_area *area, size_t max, uint32_t *ret_refs, uint32_t *ret_domids, uint32_t *ret_slots,
                    size_t *ret_n)
{
	const int error =
		sa_grants_list(area->chunks, table_entries(area), max, ret_refs, ret_domids, ret_slots, ret_n);

	if (error)
		return error;
	for (size_t i = 0; i < *ret_n && i < max; i++)
		ret_slots[i] = ret_slots[i] >= area->base ? (uint32_t)(ret_slots[i] - area->base) : SA_NONE;
	return 0;
}

int sa_area_usage(sa_area *area, size_t *ret_granted, size_t *ret_in_use)
{
	size_t granted = 0;
	size_t in_use = 0;

	for (size_t ref = SA_GRANT_FIRST; ref < table_entries(area); ref++) {
		/* UNTRUSTED: Xen turns bits when guests say so. */
		const uint16_t flags =
			atomic_load_explicit(&entry_at(area->chunks, (uint32_t)ref)->flags, memory_order_acquire);

		granted += flags != 0;
		in_use += (flags & GTF_IN_USE) != 0;
	}
	*ret_granted = granted;
	*ret_in_use = in_use;
	return 0;
}
