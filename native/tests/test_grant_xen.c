/*
 * test_grant_xen.c - the entries of a grant table over plain memory, with a thread that does to them what Xen does when
 * a guest maps and unmaps (xen/common/grant_table.c, _set_status_v1 and map_grant_ref). Frames, hypercalls and the real
 * table need Xen: tests/xen.
 */
#include "sa.h"

#include "check.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNKS = 3, ENTRIES = 2 * SA_GRANT_CHUNK + 512, PERMIT = 1, READONLY = 4, READING = 8, WRITING = 16 };

/* As Xen reads it: flags and domid in one word, then the frame. */
struct xen_entry {
	_Atomic(uint32_t) flags_domid;
	_Atomic(uint32_t) frame;
};

static void *chunks[CHUNKS];

static struct xen_entry *at(uint32_t ref)
{
	return (struct xen_entry *)chunks[ref / SA_GRANT_CHUNK] + ref % SA_GRANT_CHUNK;
}

static uint32_t flags_of(uint32_t ref)
{
	return atomic_load(&at(ref)->flags_domid) & 0xffffU;
}

static int table_make(void)
{
	for (size_t i = 0; i < CHUNKS; i++) {
		/* The last chunk is shorter, so that a step beyond it is seen. */
		const size_t entries = i + 1 < CHUNKS ? SA_GRANT_CHUNK : ENTRIES % SA_GRANT_CHUNK;

		chunks[i] = calloc(entries, 8);
		if (!CHECK(chunks[i] != NULL))
			return 0;
	}
	return 1;
}

static void table_drop(void)
{
	for (size_t i = 0; i < CHUNKS; i++) {
		free(chunks[i]);
		chunks[i] = NULL;
	}
}

static void test_layout(void)
{
	const uint32_t refs[] = {8, SA_GRANT_CHUNK - 1, SA_GRANT_CHUNK, ENTRIES - 1};
	const uint32_t frames[] = {0x100000, 0xfffffffe, 7, 0x12345678};
	uint8_t raw[8];

	if (!table_make())
		return;
	CHECK(sa_grants_write(chunks, ENTRIES, 0x1234, frames, refs, 4) == 0);
	for (size_t i = 0; i < 4; i++) {
		CHECK(atomic_load(&at(refs[i])->flags_domid) == (0x12340000U | PERMIT | READONLY));
		CHECK(atomic_load(&at(refs[i])->frame) == frames[i]);
	}
	/* Byte by byte, as the public header lays it out. */
	memcpy(raw, at(ENTRIES - 1), sizeof raw);
	CHECK(memcmp(raw, "\x05\x00\x34\x12\x78\x56\x34\x12", sizeof raw) == 0);
	CHECK(atomic_load(&at(9)->flags_domid) == 0);
	table_drop();
}

static void test_what_is_refused_changes_nothing(void)
{
	static const uint32_t frames[3] = {1, 2, 3};
	const struct {
		uint32_t domid;
		uint32_t refs[3];
		int error;
	} cases[] = {
		{1, {8, 7, 9}, -EINVAL},          /* Xen's own entries */
		{1, {8, 0, 9}, -EINVAL},          /* the console's */
		{1, {8, 9, ENTRIES}, -ERANGE},    /* outside */
		{1, {8, 9, UINT32_MAX}, -ERANGE}, /* far outside */
		{1, {10, 11, 10}, -EINVAL},       /* twice */
		{0x7ff0, {10, 11, 12}, -EINVAL},  /* DOMID_SELF */
		{0x10001, {10, 11, 12}, -EINVAL}, /* does not fit */
		{1, {10, 11, 20}, -EBUSY},        /* granted already */
		{1, {10, 11, 21}, -EBUSY},        /* in use */
	};
	uint8_t *before;
	uint8_t busy[3];

	if (!table_make())
		return;
	atomic_store(&at(20)->flags_domid, 0x50000U | PERMIT | READONLY);
	atomic_store(&at(21)->flags_domid, 0x50000U | PERMIT | READONLY | READING);
	before = malloc((size_t)SA_GRANT_CHUNK * 8);
	if (!CHECK(before != NULL))
		return;
	memcpy(before, chunks[0], (size_t)SA_GRANT_CHUNK * 8);
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		CHECK(sa_grants_write(chunks, ENTRIES, cases[i].domid, frames, cases[i].refs, 3) == cases[i].error);
		CHECK(memcmp(before, chunks[0], (size_t)SA_GRANT_CHUNK * 8) == 0);
	}
	/* A bad reference behind a good one: the good one is not revoked. */
	CHECK(sa_grants_revoke(chunks, ENTRIES, (const uint32_t[]){20, 3}, 2, busy) == -EINVAL);
	CHECK(sa_grants_revoke(chunks, ENTRIES, (const uint32_t[]){20, ENTRIES}, 2, busy) == -ERANGE);
	CHECK(memcmp(before, chunks[0], (size_t)SA_GRANT_CHUNK * 8) == 0);
	free(before);
	table_drop();
}

static void test_revoking(void)
{
	static const uint32_t refs[] = {30, 31, 32, 33, 34};
	uint8_t busy[5];

	if (!table_make())
		return;
	atomic_store(&at(30)->flags_domid, 0x50000U | PERMIT | READONLY);
	atomic_store(&at(31)->flags_domid, 0x50000U | PERMIT | READONLY | READING);
	atomic_store(&at(32)->flags_domid, 0x50000U | PERMIT | WRITING | READING);
	atomic_store(&at(33)->flags_domid, 0);
	atomic_store(&at(34)->flags_domid, 0x50000U | PERMIT);
	memset(busy, 7, sizeof busy);
	CHECK(sa_grants_revoke(chunks, ENTRIES, refs, 5, busy) == 0);
	CHECK(memcmp(busy, "\0\1\1\0\0", 5) == 0);
	CHECK(flags_of(30) == 0 && flags_of(34) == 0);
	CHECK(flags_of(31) == (PERMIT | READONLY | READING));
	CHECK(flags_of(32) == (PERMIT | WRITING | READING));
	/* The guest lets go: now it is free, and can be granted again. */
	atomic_store(&at(31)->flags_domid, 0x50000U | PERMIT | READONLY);
	CHECK(sa_grants_revoke(chunks, ENTRIES, refs + 1, 1, busy) == 0 && busy[0] == 0 && flags_of(31) == 0);
	CHECK(sa_grants_write(chunks, ENTRIES, 6, (const uint32_t[]){9}, refs + 1, 1) == 0);
	CHECK(atomic_load(&at(31)->flags_domid) == (0x60000U | PERMIT | READONLY));
	table_drop();
}

static void test_listing(void)
{
	static const uint32_t refs[] = {ENTRIES - 1, 8, SA_GRANT_CHUNK};
	static const uint32_t frames[] = {11, 12, 13};
	uint32_t got_refs[3], got_domids[3], got_frames[3];
	size_t n = 99;

	if (!table_make())
		return;
	CHECK(sa_grants_list(chunks, ENTRIES, 0, NULL, NULL, NULL, &n) == 0 && n == 0);
	/* Not ours to list. */
	atomic_store(&at(1)->flags_domid, PERMIT);
	CHECK(sa_grants_write(chunks, ENTRIES, 3, frames, refs, 3) == 0);
	CHECK(sa_grants_list(chunks, ENTRIES, 0, NULL, NULL, NULL, &n) == 0 && n == 3);
	CHECK(sa_grants_list(chunks, ENTRIES, 2, got_refs, got_domids, got_frames, &n) == 0 && n == 3);
	CHECK(got_refs[0] == 8 && got_frames[0] == 12 && got_domids[0] == 3);
	CHECK(got_refs[1] == SA_GRANT_CHUNK && got_frames[1] == 13);
	CHECK(sa_grants_list(chunks, ENTRIES, 3, got_refs, got_domids, got_frames, &n) == 0 && n == 3);
	CHECK(got_refs[2] == ENTRIES - 1 && got_frames[2] == 11);
	table_drop();
}

/* ---------------------------------------------------------------------------------------------------- the race */

enum { RACERS = 4, FIRST_RACER = 100, ROUNDS = 100000, ENOUGH = 20000, GUEST = 5 };

static _Atomic(int) mapped[RACERS]; /* what the guest of this ref has mapped, as Xen knows */
static _Atomic(int) bad_frames;     /* mappings of a frame that was not granted by then */
static _Atomic(size_t) mappings;
static _Atomic(int) stop;

/* A frame and what it was granted for are told apart by this. */
static uint32_t frame_of(uint32_t round, uint32_t i)
{
	return 1 + round * RACERS + i;
}

static _Atomic(uint32_t) granted[RACERS]; /* the frame that is or was last granted */

/* One guest that maps and unmaps one entry after the other. It waits for each to be granted, so that it looks at the
 * moment of writing, and holds some for a while. */
static void *hypervisor(void *unused)
{
	uint32_t turn = 0;

	(void)unused;
	while (!atomic_load(&stop)) {
		const uint32_t i = turn++ % RACERS;
		struct xen_entry *entry = at(FIRST_RACER + i);

		for (int patience = 0; patience < 2000; patience++) {
			uint32_t seen = atomic_load(&entry->flags_domid);

			if ((seen & 0xffffU) != (PERMIT | READONLY) || seen >> 16 != GUEST)
				continue;
			if (!atomic_compare_exchange_strong(&entry->flags_domid, &seen, seen | READING))
				continue;
			atomic_store(&mapped[i], 1);
			if (atomic_load(&entry->frame) != atomic_load(&granted[i]))
				atomic_fetch_add(&bad_frames, 1);
			atomic_fetch_add(&mappings, 1);
			for (uint32_t held = 0; held < turn % 64; held++)
				(void)atomic_load(&stop);
			atomic_store(&mapped[i], 0);
			atomic_fetch_and(&entry->flags_domid, ~(uint32_t)READING);
			break;
		}
	}
	return NULL;
}

static void test_revoking_against_a_guest_that_maps(void)
{
	uint32_t refs[RACERS], frames[RACERS];
	uint8_t busy[RACERS];
	size_t freed = 0, in_use = 0, wrong = 0, refused = 0;
	pthread_t thread;

	if (!table_make())
		return;
	atomic_store(&stop, 0);
	if (!CHECK(pthread_create(&thread, NULL, hypervisor, NULL) == 0))
		return;
	/* With one processor the two take turns of milliseconds: then it takes as many rounds as it takes. */
	for (uint32_t round = 0; round < ROUNDS || (atomic_load(&mappings) < ENOUGH && round < 1000 * ROUNDS);
	     round++) {
		size_t n = 0;

		for (uint32_t i = 0; i < RACERS; i++) {
			if (flags_of(FIRST_RACER + i) != 0)
				continue; /* was in use the last time */
			refs[n] = FIRST_RACER + i;
			frames[n] = frame_of(round, i);
			atomic_store(&granted[i], frames[n]);
			n++;
		}
		if (sa_grants_write(chunks, ENTRIES, GUEST, frames, refs, n) != 0)
			refused++;
		for (uint32_t i = 0; i < RACERS; i++)
			refs[i] = FIRST_RACER + i;
		if (sa_grants_revoke(chunks, ENTRIES, refs, RACERS, busy) != 0)
			refused++;
		for (uint32_t i = 0; i < RACERS; i++) {
			/* Free means that nobody has it and nobody can get it: the next grant may go to anybody. */
			if (!busy[i] && (atomic_load(&mapped[i]) != 0 || flags_of(FIRST_RACER + i) != 0))
				wrong++;
			freed += busy[i] == 0;
			in_use += busy[i] != 0;
		}
	}
	atomic_store(&stop, 1);
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK(wrong == 0);
	CHECK(refused == 0);
	CHECK(atomic_load(&bad_frames) == 0);
	CHECK(freed > 0 && atomic_load(&mappings) > 0);
	printf("race: %zu mappings, %zu revoked, %zu in use\n", atomic_load(&mappings), freed, in_use);
	table_drop();
}

int main(void)
{
	test_layout();
	test_what_is_refused_changes_nothing();
	test_revoking();
	test_listing();
	test_revoking_against_a_guest_that_maps();
	return check_done("grant_xen");
}
