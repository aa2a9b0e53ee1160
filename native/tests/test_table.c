/*
 * test_table.c - the fingerprint table without Python: each function by example, tables large enough to grow, a seed
 * that spreads nothing, and memory running out. That random sequences give what the twin gives, tests/test_pagetable.py
 * shows.
 */
#include "check.h"
#include "sa.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { MANY = 140000, SPREAD_NOTHING = 9000 };

static const uint8_t zero_fp[SA_FP_SIZE] = {[0] = 0xaa, [31] = 0xaa}; /* none of counted_fps */

/* How many calloc from now on succeed before one fails. */
static size_t refuse_after = SIZE_MAX;

/* In place of the C library's, for this program and the core in it. Sanitizers still see malloc. */
void *calloc(size_t n, size_t size)
{
	void *memory;

	if (refuse_after != SIZE_MAX && refuse_after-- == 0)
		return NULL;
	memory = malloc(n * size);
	if (memory)
		explicit_bzero(memory, n * size); /* with memset, the compiler makes the two a calloc */
	return memory;
}

/* splitmix64, so that every run is the same */
static uint64_t random_state = 1;

static uint64_t draw(void)
{
	uint64_t z = random_state += UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	return z ^ (z >> 31);
}

static void draw_seed(uint8_t *ret_seed)
{
	for (size_t i = 0; i < 40; i++)
		ret_seed[i] = (uint8_t)draw();
}

/* n fingerprints that differ in 4 bytes only, at the given place. */
static uint8_t *counted_fps(uint32_t n, size_t place)
{
	uint8_t *fps = calloc(n, SA_FP_SIZE);

	if (!fps)
		abort();
	for (uint32_t i = 0; i < n; i++)
		memcpy(fps + (size_t)i * SA_FP_SIZE + place, &i, sizeof i);
	return fps;
}

static uint32_t *numbers(size_t n)
{
	uint32_t *array = calloc(n, sizeof *array);

	if (!array)
		abort();
	return array;
}

static sa_table *open_table(uint32_t max_holders, uint32_t max_pages)
{
	uint8_t seed[40];
	sa_table *table = NULL;

	draw_seed(seed);
	if (!CHECK(sa_table_create(seed, zero_fp, max_holders, max_pages, &table) == 0))
		abort();
	return table;
}

static struct sa_table_totals totals_of(const sa_table *table)
{
	struct sa_table_totals totals;

	CHECK(sa_table_totals(table, &totals) == 0);
	return totals;
}

/* Equal but for memory, which a call that failed may have taken. */
static int same_totals(struct sa_table_totals a, struct sa_table_totals b)
{
	a.memory_bytes = b.memory_bytes;
	return memcmp(&a, &b, sizeof a) == 0;
}

static void test_create(void)
{
	static const uint8_t seed[40];
	sa_table *table = NULL;

	CHECK(sa_table_create(seed, zero_fp, 0, 1, &table) == -EINVAL);
	CHECK(sa_table_create(seed, zero_fp, 1, 0, &table) == -EINVAL);
	CHECK(sa_table_create(seed, zero_fp, 1, UINT32_MAX, &table) == -EINVAL);
	CHECK(table == NULL);
	CHECK(sa_table_create(seed, zero_fp, 1, UINT32_MAX - 1, &table) == 0);
	CHECK(totals_of(table).pages == 0);
	sa_table_destroy(table);
	sa_table_destroy(NULL);
}

static void test_references(void)
{
	sa_table *table = open_table(1, 4);
	uint8_t *fps = counted_fps(6, 28);
	uint8_t back[2 * SA_FP_SIZE];
	uint32_t ids[6];
	uint32_t freed[6];
	size_t nfreed;
	struct sa_table_totals before;

	memcpy(fps + SA_FP_SIZE, zero_fp, SA_FP_SIZE);
	CHECK(sa_table_intern(table, fps, 4, ids) == 0);
	CHECK(ids[0] == 1 && ids[1] == 0 && ids[2] == 2 && ids[3] == 3);
	before = totals_of(table);
	CHECK(sa_table_intern(table, fps, 6, ids) == -ENOSPC);
	CHECK(same_totals(before, totals_of(table)));

	ids[0] = 3;
	ids[1] = 0;
	ids[2] = 3; /* the failed call gave it no second reference */
	CHECK(sa_table_unref(table, ids, 3, freed, &nfreed) == -EINVAL && nfreed == 0);
	CHECK(sa_table_unref(table, ids, 2, freed, &nfreed) == 0 && nfreed == 0);
	CHECK(totals_of(table).pages == 2);
	CHECK(sa_table_fps(table, ids, 1, back) == -EINVAL);
	CHECK(sa_table_intern(table, fps + 5 * SA_FP_SIZE, 1, ids) == 0 && ids[0] == 3);
	ids[1] = 0;
	CHECK(sa_table_fps(table, ids, 2, back) == 0);
	CHECK(memcmp(back, fps + 5 * SA_FP_SIZE, SA_FP_SIZE) == 0);
	CHECK(memcmp(back + SA_FP_SIZE, zero_fp, SA_FP_SIZE) == 0);
	free(fps);
	sa_table_destroy(table);
}

/* Every function refuses every number out of its range, and changes nothing. */
static void test_bounds(void)
{
	static const uint32_t bad[] = {3, 4096, 16384, UINT32_MAX};
	static const uint32_t slots[] = {5, 6};
	sa_table *table = open_table(65, 100);
	uint8_t *fps = counted_fps(2, 0);
	uint32_t ids[2];
	uint32_t out[6];
	uint8_t out_fps[2 * SA_FP_SIZE];
	uint64_t a, b, c;
	size_t n;
	struct sa_table_totals before;

	CHECK(sa_table_intern(table, fps, 2, ids) == 0);
	CHECK(sa_table_mark(table, ids, 2, 64) == 0);
	CHECK(sa_table_mark(table, ids, 2, 65) == -EINVAL);
	CHECK(sa_table_unmark(table, ids, 2, 65) == -EINVAL);
	CHECK(sa_table_forget(table, 65) == -EINVAL);
	CHECK(sa_table_runs(table, ids, NULL, 2, 0, out, &n) == -EINVAL);
	before = totals_of(table);
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		ids[1] = bad[i];
		CHECK(sa_table_unref(table, ids, 2, out, &n) == -EINVAL);
		CHECK(sa_table_mark(table, ids, 2, 0) == -EINVAL);
		CHECK(sa_table_unmark(table, ids, 2, 64) == -EINVAL);
		CHECK(sa_table_want(table, ids, 2, 0, out, &n) == -EINVAL);
		CHECK(sa_table_unwant(table, ids, 2) == -EINVAL);
		CHECK(sa_table_publish(table, ids, slots, 2, out, &n) == -EINVAL);
		CHECK(sa_table_fps(table, ids, 2, out_fps) == -EINVAL);
		CHECK(sa_table_slots(table, ids, 2, out) == -EINVAL);
		CHECK(sa_table_count(table, ids, 2, &a, &b, &c) == -EINVAL);
		CHECK(sa_table_runs(table, ids, NULL, 2, 8, out, &n) == -EINVAL);
	}
	CHECK(same_totals(before, totals_of(table)));
	/* The first page has its reference, its one holder, and is not pending. */
	CHECK(sa_table_want(table, ids, 1, 2, out, &n) == 0 && n == 0);
	CHECK(sa_table_want(table, ids, 1, 1, out, &n) == 0 && n == 1);
	CHECK(sa_table_unref(table, ids, 1, out, &n) == 0);
	free(fps);
	sa_table_destroy(table);
}

/* The first id past a full chunk has no memory behind it. */
static void test_chunk_end(void)
{
	enum { CHUNK = 16384 };
	sa_table *table = open_table(1, CHUNK);
	uint8_t *fps = counted_fps(CHUNK - 1, 8);
	uint32_t *ids = numbers(CHUNK);
	uint32_t past = CHUNK;
	uint32_t slot;

	CHECK(sa_table_intern(table, fps, CHUNK - 1, ids) == 0);
	CHECK(ids[CHUNK - 2] == CHUNK - 1);
	CHECK(sa_table_slots(table, &past, 1, &slot) == -EINVAL);
	CHECK(sa_table_mark(table, &past, 1, 0) == -EINVAL);
	free(fps);
	free(ids);
	sa_table_destroy(table);
}

static void test_publication(void)
{
	sa_table *table = open_table(2, 100);
	uint8_t *fps = counted_fps(4, 16);
	uint32_t ids[4];
	uint32_t freed[4];
	uint32_t slots[4] = {10, 11, 12, 13};
	uint32_t out[12];
	uint32_t live_ids[4];
	uint64_t zero, in_slot, repeated, mapped, share;
	size_t n;
	struct sa_table_totals totals;

	CHECK(sa_table_intern(table, fps, 4, ids) == 0);
	CHECK(sa_table_mark(table, ids, 4, 0) == 0);
	CHECK(sa_table_mark(table, ids + 1, 3, 1) == 0);
	CHECK(sa_table_want(table, ids, 4, 2, out, &n) == 0);
	CHECK(n == 3 && out[0] == 1 && out[1] == 2 && out[2] == 3);
	CHECK(sa_table_want(table, ids, 4, 2, out, &n) == 0 && n == 0);
	CHECK(totals_of(table).pending == 3);

	/* 2 loses its last reference while pending: no slot for it. */
	CHECK(sa_table_unref(table, ids + 1, 1, freed, &n) == 0 && n == 0);
	CHECK(sa_table_publish(table, ids + 1, slots + 1, 3, freed, &n) == 0);
	CHECK(n == 1 && freed[0] == 11);
	totals = totals_of(table);
	CHECK(totals.pending == 0 && totals.pages == 3 && totals.slots_used == 2 && totals.by_holders[2] == 2);
	ids[1] = ids[3];
	CHECK(sa_table_count(table, ids, 4, &zero, &in_slot, &repeated) == 0);
	CHECK(zero == 0 && in_slot == 3 && repeated == 1);

	/* Taken, given twice, none: refused as a whole. */
	slots[0] = 20;
	slots[1] = 12;
	ids[1] = ids[0];
	CHECK(sa_table_publish(table, ids, slots, 2, freed, &n) == -EEXIST && n == 0);
	slots[1] = 20;
	CHECK(sa_table_publish(table, ids, slots, 2, freed, &n) == -EEXIST);
	slots[1] = SA_NONE;
	CHECK(sa_table_publish(table, ids, slots, 2, freed, &n) == -EINVAL);
	CHECK(sa_table_publish(table, ids, slots, 1, freed, &n) == 0 && n == 0);

	/* 3 and 4 are in slots 12 and 13: one run, but for the end of a segment. */
	CHECK(sa_table_runs(table, ids + 2, NULL, 2, 13, out, &n) == 0 && n == 2);
	CHECK(sa_table_runs(table, ids + 2, NULL, 2, 64, out, &n) == 0 && n == 1);
	CHECK(out[0] == 0 && out[1] == 12 && out[2] == 2);
	CHECK(sa_table_map(table, out, 1) == 0);
	out[2] = 3;
	CHECK(sa_table_map(table, out, 1) == -ERANGE);
	CHECK(sa_table_unmap(table, out, 1, freed, &n) == -ERANGE && n == 0);
	share = 5;
	CHECK(sa_table_share(table, out, 1, &share) == -ERANGE && share == 5);
	totals = totals_of(table);
	CHECK(totals.mappings == 2 && totals.slots_mapped == 2);

	/* Two map 12, one maps 13, nobody maps 20. */
	out[2] = 1;
	CHECK(sa_table_map(table, out, 1) == 0);
	out[2] = 2;
	CHECK(sa_table_share(table, out, 1, &share) == 0 && share == SA_SHARE_PAGE / 2 + SA_SHARE_PAGE);
	out[2] = 1;
	CHECK(sa_table_share(table, out, 1, &share) == 0 && share == SA_SHARE_PAGE / 2);
	CHECK(sa_table_unmap(table, out, 1, freed, &n) == 0 && n == 0);
	out[4] = 20;
	out[5] = 1;
	CHECK(sa_table_share(table, out, 2, &share) == -EINVAL && share == SA_SHARE_PAGE / 2);
	out[4] = UINT32_MAX;
	out[5] = 2;
	CHECK(sa_table_share(table, out, 2, &share) == -ERANGE);
	out[2] = 3;

	/* 3 moves; its old slot stays taken as long as it is mapped. */
	slots[0] = 30;
	CHECK(sa_table_publish(table, ids + 2, slots, 1, freed, &n) == 0 && n == 0);
	slots[0] = 12;
	CHECK(sa_table_publish(table, ids, slots, 1, freed, &n) == -EEXIST);
	out[2] = 2;
	CHECK(sa_table_unmap(table, out, 1, freed, &n) == 0 && n == 1 && freed[0] == 12);
	CHECK(sa_table_unmap(table, out, 1, freed, &n) == -EINVAL);
	CHECK(sa_table_live(table, 13, SIZE_MAX, out, live_ids, &n, &mapped) == 0);
	CHECK(n == 3 && out[0] == 13 && live_ids[0] == ids[3] && out[1] == 20 && out[2] == 30 && mapped == 0);
	CHECK(sa_table_unref(table, ids + 2, 2, freed, &n) == 0 && n == 2 && freed[0] == 30 && freed[1] == 13);
	free(fps);
	sa_table_destroy(table);
}

static void test_census(void)
{
	sa_table *table = open_table(70, 100);
	uint8_t *fps = counted_fps(3, 16);
	uint32_t ids[4] = {0};
	uint64_t held[70], common[70], share[70];
	struct sa_table_census census;

	CHECK(sa_table_intern(table, fps, 3, ids + 1) == 0);
	CHECK(sa_table_mark(table, ids, 3, 0) == 0 && sa_table_mark(table, ids + 2, 2, 69) == 0);
	CHECK(sa_table_mark(table, ids + 2, 1, 64) == 0);
	CHECK(sa_table_census(table, 0, SIZE_MAX, 2, held, common, share, &census) == 0);
	CHECK(census.common == 1 && census.copies == 3 && census.end == 4);
	CHECK(held[0] == 2 && held[64] == 1 && held[69] == 2 && held[1] == 0);
	CHECK(common[0] == 1 && common[64] == 1 && common[69] == 1 && share[69] == SA_SHARE_PAGE / 3);
	CHECK(sa_table_census(table, 3, 1, 1, held, common, share, &census) == 0);
	CHECK(census.common == 1 && census.copies == 1 && held[0] == 0 && held[69] == 1);
	CHECK(sa_table_census(table, UINT32_MAX, SIZE_MAX, 0, held, common, share, &census) == 0);
	CHECK(census.common == 0 && census.end == 4 && held[69] == 0);
	free(fps);
	sa_table_destroy(table);
}

static void test_holders(void)
{
	sa_table *table = open_table(70, 100);
	uint8_t *fps = counted_fps(2, 16);
	uint32_t ids[3] = {0};
	uint32_t slots[2] = {4, 5};
	uint32_t out[3];
	uint64_t zero, in_slot, repeated, mapped;
	size_t n;

	CHECK(sa_table_intern(table, fps, 2, ids + 1) == 0);
	CHECK(sa_table_publish(table, ids + 1, slots, 2, out, &n) == 0);
	for (uint32_t holder = 0; holder < 70; holder++)
		CHECK(sa_table_mark(table, ids, 3, holder) == 0);
	CHECK(totals_of(table).by_holders[7] == 2);
	for (uint32_t holder = 0; holder < 65; holder++) {
		CHECK(sa_table_unmark(table, ids, 2, holder) == 0);
		CHECK(sa_table_unmark(table, ids, 2, holder) == 0);
	}
	CHECK(totals_of(table).by_holders[4] == 1 && totals_of(table).by_holders[7] == 1);
	for (uint32_t holder = 0; holder < 69; holder++)
		CHECK(sa_table_forget(table, holder) == 0);
	CHECK(totals_of(table).by_holders[1] == 2);

	CHECK(sa_table_count(table, ids, 3, &zero, &in_slot, &repeated) == 0);
	CHECK(zero == 1 && in_slot == 2 && repeated == 0);
	slots[0] = 6;
	CHECK(sa_table_publish(table, ids + 1, slots, 1, out, &n) == 0 && n == 1 && out[0] == 4);
	CHECK(sa_table_live(table, 6, 1, out, out + 1, &n, &mapped) == 0 && n == 1 && out[1] == ids[1]);
	CHECK(sa_table_live(table, UINT32_MAX, 1, out, out + 1, &n, &mapped) == 0 && n == 0);

	/* Nobody publishes a page that is pending and has no references: it goes, and its holder went before. */
	CHECK(sa_table_unref(table, ids + 1, 1, out, &n) == 0 && n == 1 && out[0] == 6);
	CHECK(sa_table_intern(table, fps, 1, ids + 1) == 0);
	CHECK(sa_table_want(table, ids, 3, 1, out, &n) == 0 && n == 0);
	CHECK(sa_table_want(table, ids, 3, 0, out, &n) == 0 && n == 1 && out[0] == 1);
	CHECK(sa_table_unref(table, ids + 1, 1, out, &n) == 0 && totals_of(table).pages == 2);
	CHECK(sa_table_unwant(table, ids, 3) == 0 && totals_of(table).pages == 1);
	free(fps);
	sa_table_destroy(table);
}

/* A table that grows through many sizes, is emptied by half in a random order and filled again finds what it has. */
static void test_growth(size_t place)
{
	sa_table *table = open_table(1, MANY);
	uint8_t *fps = counted_fps(MANY, place);
	uint32_t *ids = numbers(MANY);
	uint32_t *again = numbers(MANY);
	uint32_t *freed = numbers(MANY);
	uint32_t gone = 0;
	size_t n;

	for (uint32_t i = 0; i < MANY; i += 1000)
		CHECK(sa_table_intern(table, fps + (size_t)i * SA_FP_SIZE, 1000, ids + i) == 0);
	for (uint32_t i = 0; i < MANY; i++)
		again[i] = i;
	for (uint32_t i = MANY - 1; i > 0; i--) {
		uint32_t j = (uint32_t)(draw() % (i + 1));
		uint32_t swap = again[i];

		again[i] = again[j];
		again[j] = swap;
	}
	for (uint32_t i = 0; i < MANY / 2; i++)
		again[i] = ids[again[i]];
	CHECK(sa_table_unref(table, again, MANY / 2, freed, &n) == 0);
	for (uint32_t i = 0; i < MANY / 2; i++)
		ids[again[i] - 1] = 0; /* ids were given out in order */
	CHECK(totals_of(table).pages == MANY / 2);

	CHECK(sa_table_intern(table, fps, MANY, again) == 0);
	for (uint32_t i = 0; i < MANY; i++)
		gone += ids[i] != 0 && ids[i] != again[i];
	CHECK(gone == 0);
	CHECK(totals_of(table).pages == MANY);
	CHECK(totals_of(table).memory_bytes < (uint64_t)MANY * 66);
	free(fps);
	free(ids);
	free(again);
	free(freed);
	sa_table_destroy(table);
}

/* A seed of zeros sends every fingerprint to the same place: slow, and still right. */
static void test_no_spread(void)
{
	static const uint8_t seed[40];
	sa_table *table = NULL;
	uint8_t *fps = counted_fps(SPREAD_NOTHING, 4);
	uint32_t *ids = numbers(SPREAD_NOTHING);
	uint32_t *again = numbers(SPREAD_NOTHING);
	size_t n;

	CHECK(sa_table_create(seed, zero_fp, 1, SPREAD_NOTHING, &table) == 0);
	CHECK(sa_table_intern(table, fps, SPREAD_NOTHING, ids) == 0);
	CHECK(sa_table_intern(table, fps, SPREAD_NOTHING, again) == 0);
	CHECK(memcmp(ids, again, SPREAD_NOTHING * sizeof *ids) == 0);
	CHECK(totals_of(table).memory_bytes < 1024 * 1024);
	for (int times = 0; times < 2; times++)
		CHECK(sa_table_unref(table, ids, 10, again, &n) == 0);
	CHECK(totals_of(table).pages == SPREAD_NOTHING - 10);
	free(fps);
	free(ids);
	free(again);
	sa_table_destroy(table);
}

/* Whatever piece of memory a call does not get, it fails and changes nothing; tried again it does what it should. */
static void test_no_memory(void)
{
	uint8_t seed[40];
	sa_table *table = NULL;
	uint8_t *fps = counted_fps(MANY, 12);
	uint32_t *ids = numbers(MANY);
	uint32_t *freed = numbers(MANY);
	uint32_t *slots = numbers(MANY);
	struct sa_table_totals before;
	size_t refused = 0;
	size_t wrong = 0;
	size_t n;

	draw_seed(seed);
	for (refuse_after = 0; sa_table_create(seed, zero_fp, 64, MANY, &table) == -ENOMEM; refuse_after = refused)
		refused++;
	CHECK(refused == 5 && table != NULL);
	for (uint32_t i = 0; i < MANY; i += 1000) {
		for (size_t try = 0;; try++) {
			int error;

			before = totals_of(table);
			refuse_after = try < 20 ? try % 5 : SIZE_MAX;
			error = sa_table_intern(table, fps + (size_t)i * SA_FP_SIZE, 1000, ids + i);
			if (!error)
				break;
			refused++;
			wrong += error != -ENOMEM || !same_totals(before, totals_of(table));
		}
	}
	CHECK(wrong == 0);
	CHECK(refused > 100);
	for (uint32_t i = 0; i < MANY; i++)
		wrong += ids[i] != i + 1;
	CHECK(wrong == 0);

	/* Slots far apart, each with a chunk of its own. */
	refused = 0;
	before = totals_of(table);
	for (uint32_t i = 0; i < 1000; i++)
		slots[i] = i * 4000000;
	for (refuse_after = 0;; refuse_after = refused % 9) {
		int error = sa_table_publish(table, ids, slots, 1000, freed, &n);

		if (!error)
			break;
		refused++;
		wrong += error != -ENOMEM || n != 0 || !same_totals(before, totals_of(table));
	}
	refuse_after = SIZE_MAX;
	CHECK(wrong == 0);
	CHECK(refused > 100);
	CHECK(totals_of(table).slots_used == 1000);
	free(fps);
	free(ids);
	free(freed);
	free(slots);
	sa_table_destroy(table);
}

int main(void)
{
	test_create();
	test_references();
	test_bounds();
	test_chunk_end();
	test_publication();
	test_holders();
	test_census();
	test_growth(0);
	test_growth(28);
	test_no_spread();
	test_no_memory();
	return check_done("test_table");
}
