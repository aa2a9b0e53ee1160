/*
 * shim_regions.c - the table of mappings: what they are, how the file's own mapping is set aside for shared pages, how
 * it comes back, and what the program says of what it maps and unmaps (shim.h's functions for that).
 *
 * All with the lock, which only the two around dlclose take themselves. What is mapped is found out elsewhere, and so
 * is which pages are shared.
 */
#include "shim_parts.h"

#include <asm/unistd.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

enum { MAX_REGIONS = 4096, MAX_NOTES = 512, RESERVE_PAGES = 13 };

struct range {
	uintptr_t start;
	size_t length;
};

static struct region regions[MAX_REGIONS]; /* by address */
static size_t nregions;
static struct range notes[MAX_NOTES]; /* what the program has mapped; length 0: nothing */
static size_t next_note;
static uint64_t pieces_used;
static unsigned closings; /* calls of dlclose under way */
/* mremap is refused in a process that is near vm.max_map_count, also where it would leave fewer mappings. So a few are
 * set aside: pages with rights by turns, each a mapping. */
static uint8_t *reserve;

/* --------------------------------------------------------------------------------------------------- the table */

/* Index of the first region that ends behind an address. */
static size_t first_behind(uintptr_t address)
{
	size_t low = 0;
	size_t high = nregions;

	while (low < high) {
		const size_t middle = low + (high - low) / 2;

		if (sa_region_end(&regions[middle]) <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

void sa_region_add(const struct region *region)
{
	const size_t index = first_behind(region->start);

	if (nregions == MAX_REGIONS || (index < nregions && regions[index].start < sa_region_end(region)))
		return;
	memmove(&regions[index + 1], &regions[index], (nregions - index) * sizeof regions[0]);
	regions[index] = *region;
	nregions++;
}

static void region_remove(size_t index)
{
	nregions--;
	memmove(&regions[index], &regions[index + 1], (nregions - index) * sizeof regions[0]);
	atomic_store(&sa_emptied, true);
}

struct region *sa_region_find(const struct region *is)
{
	const size_t index = first_behind(is->start);
	struct region *region = &regions[index];

	return index < nregions && region->start == is->start && region->ino == is->ino && region->dev == is->dev
	               ? region
	               : NULL;
}

bool sa_region_is_known(const struct region *region)
{
	const size_t index = first_behind(region->start);

	if (index < nregions && regions[index].start < sa_region_end(region))
		return true;
	for (size_t i = 0; i < nregions; i++) {
		if (regions[i].aside && regions[i].aside < sa_region_end(region) &&
		    regions[i].aside + regions[i].length > region->start)
			return true;
	}
	return false;
}

void sa_region_leave_alone(struct region *region)
{
	region->file = LEFT_ALONE;
	atomic_store(&sa_emptied, true);
}

bool sa_regions_have(int16_t file)
{
	for (size_t i = 0; i < nregions; i++) {
		if (regions[i].file == file)
			return true;
	}
	return false;
}

void sa_regions_forget_files(void)
{
	for (size_t i = 0; i < nregions; i++) {
		if (regions[i].file >= 0)
			regions[i].file = NO_FILE;
	}
}

void sa_regions_doubt(void)
{
	for (size_t i = 0; i < nregions; i++)
		regions[i].verified = false;
}

void sa_regions_verify(const struct region *is)
{
	for (size_t i = first_behind(is->start); i < nregions && regions[i].start < sa_region_end(is); i++) {
		struct region *region = &regions[i];

		region->verified = region->start >= is->start && sa_region_end(region) <= sa_region_end(is) &&
		                   region->dev == is->dev && region->ino == is->ino &&
		                   region->protection == is->protection &&
		                   region->first == is->first + (region->start - is->start) / PAGE;
	}
}

/* ------------------------------------------------------------------------- the swap, and the file's pages back */

static bool reserve_take(void)
{
	long pages;

	if (reserve)
		return true;
	pages = sa_call(__NR_mmap, 0, RESERVE_PAGES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
	                0);
	if (pages < 0)
		return false;
	for (long i = 1; i < RESERVE_PAGES; i += 2) {
		if (sa_call3(__NR_mprotect, pages + i * PAGE, PAGE, PROT_READ) < 0) {
			(void)sa_call3(__NR_munmap, pages, RESERVE_PAGES * PAGE, 0); /* ours alone */
			return false;
		}
	}
	reserve = (uint8_t *)(uintptr_t)pages;
	return true;
}

static void reserve_give(void)
{
	if (reserve)
		(void)sa_call3(__NR_munmap, sa_at(reserve), RESERVE_PAGES * PAGE, 0); /* ours alone */
	reserve = NULL;
}

struct region *sa_region_to_swap(int16_t file, const struct region *after)
{
	for (size_t i = after ? (size_t)(after - regions) + 1 : 0; i < nregions; i++) {
		struct region *region = &regions[i];

		if (region->file == file && region->aside == 0 && (region->origin != ORIGIN_LATE || closings == 0))
			return region;
	}
	return NULL;
}

uint64_t sa_regions_pieces(void)
{
	return pieces_used;
}

int sa_region_set_aside(struct region *region)
{
	long aside;
	long hint = 0;

	if (!reserve_take())
		return -ENOMEM;
	/* The new address is a hint here, but Linux (seen on 6.18) refuses one whose range meets the old one
	 * (check_mremap_params), and programs that are linked to low addresses are in the way of the default, 0. The
	 * reserve is high, and taken. */
	if (region->start < region->length)
		hint = sa_at(reserve);
	aside = sa_call(__NR_mremap, (long)region->start, (long)region->length, (long)region->length,
	                MREMAP_MAYMOVE | MREMAP_DONTUNMAP, hint, 0);
	if (aside < 0)
		return (int)aside;
	region->aside = (uintptr_t)aside;
	/* It took the page table along, and what is mapped stays in the page cache. Nothing of it is the program's own. */
	(void)sa_call3(__NR_madvise, aside, (long)region->length, MADV_DONTNEED);
	return 0;
}

int sa_region_share(struct region *region, uint64_t page, uint64_t count, int fd, uint64_t offset)
{
	const long placed =
		sa_call(__NR_mmap, (long)(region->start + (page - region->first) * PAGE), (long)(count * PAGE),
	                region->protection, MAP_PRIVATE | MAP_FIXED, fd, (long)offset);

	if (placed < 0)
		return (int)placed;
	region->pages += (uint32_t)count;
	region->pieces++;
	pieces_used++;
	return 0;
}

static long move_back(const struct region *region)
{
	return sa_call(__NR_mremap, (long)region->aside, (long)region->length, (long)region->length,
	               MREMAP_MAYMOVE | MREMAP_FIXED, (long)region->start, 0);
}

int sa_region_put_back(struct region *region)
{
	long result;

	if (region->aside == 0)
		return 0;
	result = move_back(region);
	if (result == -ENOMEM && reserve) {
		reserve_give();
		result = move_back(region);
		(void)reserve_take(); /* if there is no room now, the next swap asks again */
	}
	if (result < 0)
		return (int)result;
	pieces_used -= region->pieces;
	region->aside = 0;
	region->pages = region->pieces = 0;
	return 0;
}

int sa_regions_put_back(int16_t file)
{
	int error = 0;

	for (size_t i = 0; i < nregions; i++) {
		if (regions[i].file == file) {
			const int one = sa_region_put_back(&regions[i]);

			error = one ? one : error;
		}
	}
	return error;
}

int sa_regions_put_back_all(void)
{
	int error = 0;

	for (size_t i = 0; i < nregions; i++) {
		const int one = sa_region_put_back(&regions[i]);

		error = one ? one : error;
	}
	return error;
}

bool sa_regions_are_shared(void)
{
	for (size_t i = 0; i < nregions; i++) {
		if (regions[i].aside)
			return true;
	}
	return false;
}

/* --------------------------------------------------------------------------------------- what the program says */

/* Something was mapped, or can be shared again. */
static void tell_thread(void)
{
	if (!atomic_exchange(&sa_dirty, true))
		sa_thread_wake();
}

static void note(uintptr_t start, size_t length)
{
	notes[next_note] = (struct range){start, length};
	next_note = (next_note + 1) % MAX_NOTES;
	tell_thread();
}

/* A library that came by dlopen is found as one. */
static void note_again(const struct region *region)
{
	if (region->origin != ORIGIN_LATE)
		note(region->start, region->length);
	else
		tell_thread();
}

static void notes_forget(uintptr_t start, uintptr_t end)
{
	for (size_t i = 0; i < MAX_NOTES; i++) {
		const struct range old = notes[i];

		if (old.length == 0 || old.start >= end || old.start + old.length <= start)
			continue;
		notes[i].length = start > old.start ? start - old.start : 0;
		if (notes[i].length && next_note == i)
			next_note = (i + 1) % MAX_NOTES; /* what is left of it is not overwritten by its other part */
		if (old.start + old.length > end)
			note(end, old.start + old.length - end);
	}
}

bool sa_region_is_noted(const struct region *region)
{
	for (size_t i = 0; i < MAX_NOTES; i++) {
		if (notes[i].length && notes[i].start <= region->start &&
		    notes[i].start + notes[i].length >= sa_region_end(region))
			return true;
	}
	return false;
}

int sa_shim_put_back(uintptr_t start, size_t length, bool again)
{
	const uintptr_t end = sa_page_end(start, length);

	for (size_t i = first_behind(sa_page_down(start)); i < nregions && regions[i].start < end;) {
		const struct region region = regions[i];
		const int error = sa_region_put_back(&regions[i]);

		if (error)
			return error;
		region_remove(i);
		if (again)
			note_again(&region);
	}
	if (!again)
		notes_forget(sa_page_down(start), end);
	return 0;
}

int sa_shim_put_back_edges(uintptr_t start, size_t length)
{
	const uintptr_t from = sa_page_down(start);
	const uintptr_t end = sa_page_end(start, length);

	for (size_t i = first_behind(from); i < nregions && regions[i].start < end;) {
		const struct region region = regions[i];
		int error;

		if (region.start >= from && sa_region_end(&region) <= end) {
			i++;
			continue;
		}
		error = sa_region_put_back(&regions[i]);
		if (error)
			return error;
		region_remove(i);
		note_again(&region);
	}
	return 0;
}

void sa_shim_gone(uintptr_t start, size_t length)
{
	const uintptr_t from = sa_page_down(start);
	const uintptr_t end = sa_page_end(start, length);
	bool shared = false;

	for (size_t i = first_behind(from); i < nregions && regions[i].start < end;) {
		const struct region region = regions[i];

		if (region.aside) {
			/* Ours alone, and whole. */
			(void)sa_call3(__NR_munmap, (long)region.aside, (long)region.length, 0);
			pieces_used -= region.pieces;
			shared = true;
		}
		region_remove(i);
	}
	notes_forget(from, end);
	if (shared)
		sa_thread_wake(); /* the lease of a file that is mapped no more */
}

bool sa_shim_knows(uintptr_t start, size_t length)
{
	const uintptr_t from = sa_page_down(start);
	const uintptr_t end = sa_page_end(start, length);
	const size_t index = first_behind(from);

	if (index < nregions && regions[index].start < end)
		return true;
	for (size_t i = 0; i < MAX_NOTES; i++) {
		if (notes[i].length && notes[i].start < end && notes[i].start + notes[i].length > from)
			return true;
	}
	return false;
}

size_t sa_shim_shared(uintptr_t start, size_t length)
{
	size_t pages = 0;

	for (size_t i = first_behind(start); i < nregions && regions[i].start < start + length; i++)
		pages += regions[i].pages;
	return pages * PAGE;
}

void sa_shim_mapped(uintptr_t start, size_t length)
{
	if (length >= (size_t)MIN_PAGES * PAGE)
		note(start, sa_page_end(start, length) - start);
}

/* ----------------------------------------------------------------------------------------------- dlclose, fork */

void sa_shim_before_close(void)
{
	struct sa_held held;

	sa_shim_lock(&held);
	closings++;
	for (size_t i = 0; i < nregions;) {
		if (regions[i].origin == ORIGIN_LATE && sa_region_put_back(&regions[i]) == 0)
			region_remove(i);
		else
			i++;
	}
	sa_shim_unlock(&held);
}

void sa_shim_after_close(void)
{
	struct sa_held held;

	sa_shim_lock(&held);
	closings -= closings > 0; /* none in a child that was forked inside */
	sa_shim_unlock(&held);
	tell_thread();
}

bool sa_regions_are_closing(void)
{
	return closings != 0;
}

void sa_regions_after_fork(void)
{
	/* There is room: the parent's mappings, and none more. */
	(void)sa_regions_put_back_all();
	closings = 0;
}
