/*
 * table.c - the fingerprint table of one pool: pages by fingerprint, their references, holders and slots, the slots'
 * mappings.
 *
 * sharearea/pagetable.py has the slow twin that defines every result, down to the ids that are given out and the order
 * of freed slots. Left to others: what a slot is and where its bytes are (map.c), who may hold or map what (the
 * engine).
 *
 * Memory. Pages and slots live in chunks that never move, each a structure of arrays; so growing costs one chunk, and a
 * bad number is found by one comparison. A page takes 40 bytes and 8 for every 64 holders, a slot 8, an index entry 4
 * at a load between 0.63 and 0.81. Nothing is given back before sa_table_destroy; ids, slots and entries are used
 * again.
 *
 * Failure. A function looks at all its arguments before it changes anything, or undoes what it did; memory it already
 * got then stays with the table.
 */
#include "sa.h"

#include <errno.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------------------ layout */

enum {
	PAGES_SHIFT = 14, /* pages in a chunk, log2; large, as malloc rounds each up to whole pages of memory */
	PAGES = 1 << PAGES_SHIFT,
	SLOTS_SHIFT = 14, /* slots in a chunk, log2: one segment of 64 MiB */
	SLOTS = 1 << SLOTS_SHIFT,
	SEGMENT_SMALL = 4096,  /* entries of a new index segment */
	SEGMENT_BIG = 6400,    /* of one to split: two growths by a quarter later */
	DIRECTORY_SHARE = 128, /* pages for each entry of the directory, at the least */
	BATCH = 32,            /* fingerprints looked up side by side, to wait for memory once */
	SEED_WORDS = 5,
	FP_WORDS = 4
};

/* state of a page: references, and two flags; 0 where the id is not in use */
#define REFS_MAX UINT32_C(0x3fffffff) /* MAX_REFERENCES in the twin */
#define SEEN UINT32_C(0x40000000)     /* set only inside sa_table_count */
#define PENDING UINT32_C(0x80000000)

/* page of a slot: an id, or one of these; the zero page is never in a slot */
#define NEVER UINT32_C(0)
#define LEFT SA_NONE

/* mappings of a slot */
#define MAPPINGS_MAX UINT32_C(0xfffffffe) /* MAX_MAPPINGS in the twin */
#define CLAIMED UINT32_C(0xffffffff)      /* only inside sa_table_publish: meant for a page of this call */

struct pages {
	uint8_t fp[PAGES][SA_FP_SIZE];
	uint32_t state[PAGES];
	uint32_t slot[PAGES]; /* SA_NONE: none. Of an id not in use: the one to recycle next, 0 at the end */
	uint64_t holders[];   /* holder_words of each page */
};

struct slots {
	uint32_t page[SLOTS];
	uint32_t mappings[SLOTS];
};

/* One part of the index: open addressing, linear probing. An entry is an id with bits of its fingerprint's hash above
 * it, 0 where there is none (id 0 is not in the index). There is always an empty entry. */
struct segment {
	uint32_t capacity;
	uint32_t used;
	uint32_t depth; /* leading hash bits that all its fingerprints have in common */
	uint32_t entries[];
};

struct sa_table {
	uint64_t key[SEED_WORDS];
	uint32_t max_holders;
	uint32_t max_pages;
	size_t holder_words;
	unsigned id_bits; /* of an index entry */
	uint32_t id_mask;

	struct pages **pages; /* chunks [0, next_id) / PAGES are there */
	size_t pages_room;
	uint32_t next_id;  /* ids from here on were never given out */
	uint32_t recycled; /* the id to give out next, 0: next_id */

	struct slots **slots; /* NULL where no slot of the chunk was ever used */
	size_t slots_room;

	struct segment **directory; /* 2^depth pointers; a segment of depth d is there 2^(depth - d) times in a row */
	unsigned depth;

	struct sa_table_totals totals; /* kept up to date */
};

/* ------------------------------------------------------------------------------------------------------ memory */

static uint64_t allocated(void *memory)
{
	return memory ? malloc_usable_size(memory) + sizeof(size_t) : 0; /* glibc keeps its size in front */
}

/* n zeroed elements. */
static void *take(sa_table *table, size_t n, size_t size)
{
	void *memory = calloc(n, size);

	table->totals.memory_bytes += allocated(memory);
	return memory;
}

static void give(sa_table *table, void *memory)
{
	table->totals.memory_bytes -= allocated(memory);
	free(memory);
}

/* A longer array of pointers in place of old, at least need long. */
static void *longer(sa_table *table, void *old, size_t *room, size_t need)
{
	size_t more = *room + *room / 2 + 8;
	void *array;

	if (more < need)
		more = need;
	array = take(table, more, sizeof(void *));
	if (!array)
		return NULL;
	if (*room)
		memcpy(array, old, *room * sizeof(void *));
	give(table, old);
	*room = more;
	return array;
}

/* ------------------------------------------------------------------------------------------------------- pages */

static struct pages *pages_of(const sa_table *table, uint32_t id)
{
	return table->pages[id >> PAGES_SHIFT];
}

static uint8_t *fp_of(const sa_table *table, uint32_t id)
{
	return pages_of(table, id)->fp[id & (PAGES - 1)];
}

static uint32_t *state_of(const sa_table *table, uint32_t id)
{
	return &pages_of(table, id)->state[id & (PAGES - 1)];
}

static uint32_t *slot_of(const sa_table *table, uint32_t id)
{
	return &pages_of(table, id)->slot[id & (PAGES - 1)];
}

static uint64_t *holders_of(const sa_table *table, uint32_t id)
{
	return &pages_of(table, id)->holders[(id & (PAGES - 1)) * table->holder_words];
}

static int known(const sa_table *table, uint32_t id)
{
	return id < table->next_id && *state_of(table, id) != 0;
}

static int referenced(const sa_table *table, uint32_t id)
{
	return id < table->next_id && (*state_of(table, id) & REFS_MAX) != 0;
}

static int check_known(const sa_table *table, const uint32_t *ids, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (!known(table, ids[i]))
			return -EINVAL;
	return 0;
}

/* The zero page has one reference of its own for ever, so it is known and referenced like every other. */
static int check_referenced(const sa_table *table, const uint32_t *ids, size_t n, uint32_t holder)
{
	if (holder >= table->max_holders)
		return -EINVAL;
	for (size_t i = 0; i < n; i++)
		if (!referenced(table, ids[i]))
			return -EINVAL;
	return 0;
}

static unsigned bits_set(uint64_t word)
{
	word -= (word >> 1) & UINT64_C(0x5555555555555555);
	word = (word & UINT64_C(0x3333333333333333)) + ((word >> 2) & UINT64_C(0x3333333333333333));
	word = (word + (word >> 4)) & UINT64_C(0x0f0f0f0f0f0f0f0f);
	return (unsigned)((word * UINT64_C(0x0101010101010101)) >> 56);
}

static uint32_t count_holders(const sa_table *table, uint32_t id)
{
	const uint64_t *holders = holders_of(table, id);
	uint32_t n = 0;

	for (size_t word = 0; word < table->holder_words; word++)
		n += bits_set(holders[word]);
	return n;
}

/* 0, 1, 2, 3, 4-7, 8-15, 16-31, 32 and more */
static size_t class_of(uint32_t n)
{
	size_t at = n < 4 ? n : 4;

	for (uint32_t least = 8; least <= 32 && n >= least; least *= 2)
		at++;
	return at;
}

/* Returns the counter of slots whose page has so many holders. */
static uint64_t *slots_held(sa_table *table, uint32_t nholders)
{
	return &table->totals.by_holders[class_of(nholders)];
}

static int add_pages(sa_table *table)
{
	size_t chunk = table->next_id >> PAGES_SHIFT;

	if (chunk == table->pages_room) {
		struct pages **array = longer(table, table->pages, &table->pages_room, chunk + 1);

		if (!array)
			return -ENOMEM;
		table->pages = array;
	}
	table->pages[chunk] = take(table, 1, sizeof(struct pages) + PAGES * table->holder_words * sizeof(uint64_t));
	return table->pages[chunk] ? 0 : -ENOMEM;
}

/* An id that is not in use, with its memory. It has no holders and is in use once its state is not 0. */
static int take_id(sa_table *table, uint32_t *ret_id)
{
	uint32_t id = table->recycled;

	if (table->totals.pages == table->max_pages)
		return -ENOSPC;
	if (id) {
		table->recycled = *slot_of(table, id);
	} else {
		id = table->next_id;
		if ((id & (PAGES - 1)) == 0) {
			int error = add_pages(table);

			if (error)
				return error;
		}
		table->next_id++;
	}
	*slot_of(table, id) = SA_NONE;
	table->totals.pages++;
	*ret_id = id;
	return 0;
}

/* The contrary. Given back last one first, ids are given out again as if they had not been. */
static void give_id(sa_table *table, uint32_t id)
{
	*state_of(table, id) = 0;
	*slot_of(table, id) = table->recycled;
	table->recycled = id;
	table->totals.pages--;
}

/* ------------------------------------------------------------------------------------------------------- index */

__extension__ typedef unsigned __int128 u128;

/*
 * Where a fingerprint goes. Peers choose fingerprints, all 32 bytes of them, so the place depends on a secret: with the
 * fingerprint as four words x and the seed as five words k,
 *
 *     h(x) = (k0 x0 + k1 x1 + k2 x2 + k3 x3 + k4) mod p,   p = 2^64 + 13, a prime.
 *
 * For x != y some word differs, by something that has an inverse mod p (a word is smaller than p), and k4 is added: of
 * all k in [0, p)^5 equally many give each pair of values (h(x), h(y)). So h is strongly universal (Carter and Wegman
 * 1981; Lemire and Kaser, "Strongly universal string hashing is fast", 2014). Words of a seed leave out 13 values of
 * [0, p), and 13 values of h wrap when cut to 64 bits: together an error below 2^-57 in any probability.
 *
 * What follows is a fixed bijection (the finalizer of SplitMix64, Stafford's Mix13), so the result is strongly
 * universal still, and so is any choice of its bits: two fingerprints, chosen without the seed, are neighbours as
 * rarely as by chance. It is there because linear probing asks for more than pairs: h alone keeps x, x + d, x + 2d, ...
 * equally spaced, and a peer that met one close pair would have a whole row of them (Patrascu and Thorup, "On the
 * k-independence required by linear probing and minwise independence", 2010). That the bijection breaks such rows is
 * experience, not proof; should a segment fill badly all the same, no search is longer than a segment.
 */
static uint64_t hash_fp(const sa_table *table, const uint8_t *fp)
{
	uint64_t x[FP_WORDS];
	u128 low = table->key[FP_WORDS];
	u128 high = 0;
	u128 sum;
	uint64_t h;
	uint64_t less;

	memcpy(x, fp, sizeof x);
	for (size_t i = 0; i < FP_WORDS; i++) {
		u128 product = (u128)table->key[i] * x[i];

		low += (uint64_t)product;
		high += (uint64_t)(product >> 64);
	}
	/* 2^64 = -13 mod p. 13 high < 13 * 4 * 2^64 < 64 p, so the sum is positive, and below 2^71. */
	sum = low + 64 * (((u128)1 << 64) + 13) - 13 * high;
	less = 13 * (uint64_t)(sum >> 64);
	h = (uint64_t)sum - less;
	if ((uint64_t)sum < less)
		h += 13; /* borrowed 2^64; p is 13 more */

	h = (h ^ (h >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	h = (h ^ (h >> 27)) * UINT64_C(0x94d049bb133111eb);
	return h ^ (h >> 31);
}

/* Uses of a hash: its leading bits choose the segment, the leading bits of its lower half the place in the segment, the
 * last bits go into the entry, so that most other pages on the way are told apart without a look at them. */

static struct segment *segment_of(const sa_table *table, uint64_t hash)
{
	return table->directory[(hash >> 1) >> (63 - table->depth)];
}

static uint32_t place_of(const struct segment *segment, uint64_t hash)
{
	return (uint32_t)(((hash & UINT32_MAX) * segment->capacity) >> 32);
}

static uint32_t entry_for(const sa_table *table, uint64_t hash, uint32_t id)
{
	return (uint32_t)(hash << table->id_bits) | id;
}

static uint32_t next_place(const struct segment *segment, uint32_t place)
{
	return place + 1 == segment->capacity ? 0 : place + 1;
}

static uint32_t load_limit(uint32_t capacity)
{
	return capacity / 16 * 13;
}

static struct segment *segment_create(sa_table *table, uint32_t capacity, uint32_t depth)
{
	struct segment *segment = take(table, 1, sizeof *segment + (size_t)capacity * sizeof(uint32_t));

	if (segment) {
		segment->capacity = capacity;
		segment->depth = depth;
	}
	return segment;
}

static void segment_destroy(sa_table *table, struct segment *segment)
{
	give(table, segment);
}

/* For a fingerprint that the segment does not have. */
static void segment_insert(struct segment *segment, uint64_t hash, uint32_t entry)
{
	uint32_t place = place_of(segment, hash);

	while (segment->entries[place])
		place = next_place(segment, place);
	segment->entries[place] = entry;
	segment->used++;
}

/* Copy what is in segment to lower or upper, as the bit of the hash says. -ENOSPC: one of them is full now. */
static int segment_spread(const sa_table *table, const struct segment *segment, uint64_t bit, struct segment *lower,
                          struct segment *upper)
{
	for (uint32_t place = 0; place < segment->capacity; place++) {
		uint32_t entry = segment->entries[place];

		if (entry) {
			uint64_t hash = hash_fp(table, fp_of(table, entry & table->id_mask));
			struct segment *half = hash & bit ? upper : lower;

			if (half->used == load_limit(half->capacity))
				return -ENOSPC;
			segment_insert(half, hash, entry);
		}
	}
	return 0;
}

/* Put lower and upper in the directory in place of segment. */
static void segment_replace(sa_table *table, struct segment *segment, uint64_t hash, struct segment *lower,
                            struct segment *upper)
{
	size_t count = (size_t)1 << (table->depth - segment->depth);
	size_t first = (size_t)((hash >> 1) >> (63 - table->depth)) & ~(count - 1);

	for (size_t i = 0; i < count; i++)
		table->directory[first + i] = i < count / 2 ? lower : upper;
	segment_destroy(table, segment);
}

static int segment_grow(sa_table *table, struct segment *segment, uint64_t hash)
{
	struct segment *bigger = segment_create(table, segment->capacity + segment->capacity / 4, segment->depth);

	if (!bigger)
		return -ENOMEM;
	(void)segment_spread(table, segment, 0, bigger, bigger); /* what fitted before fits */
	segment_replace(table, segment, hash, bigger, bigger);
	return 0;
}

static int directory_double(sa_table *table)
{
	size_t n = (size_t)1 << table->depth;
	struct segment **directory = take(table, n * 2, sizeof(struct segment *));

	if (!directory)
		return -ENOMEM;
	for (size_t i = 0; i < n * 2; i++)
		directory[i] = table->directory[i / 2];
	give(table, table->directory);
	table->directory = directory;
	table->depth++;
	return 0;
}

/* Halves of this capacity in place of segment. -ENOSPC: one half would be full. */
static int segment_split(sa_table *table, struct segment *segment, uint64_t hash, uint32_t capacity)
{
	struct segment *lower = segment_create(table, capacity, segment->depth + 1);
	struct segment *upper = segment_create(table, capacity, segment->depth + 1);
	int error = lower && upper ? 0 : -ENOMEM;

	if (!error && segment->depth == table->depth)
		error = directory_double(table);
	if (!error)
		error = segment_spread(table, segment, (UINT64_C(1) << 63) >> segment->depth, lower, upper);
	if (error) {
		segment_destroy(table, lower);
		segment_destroy(table, upper);
		return error;
	}
	segment_replace(table, segment, hash, lower, upper);
	return 0;
}

/* Room for one more entry in the segment of hash. What one call moves is one segment (6,400 entries at the most),
 * however large the table: the index never moves as a whole.
 *
 * A half of a split gets 2,600 fingerprints, give or take 36, where 3,328 fit. Seeds that fail there exist (one of
 * zeros does), random ones do not meet them: then halves as big as the whole hold whatever comes, the loop splits again
 * what got everything, and where that would make the directory long for the pages there are, the segment grows. */
static int index_reserve(sa_table *table, uint64_t hash)
{
	for (;;) {
		struct segment *segment = segment_of(table, hash);
		int error;

		if (segment->used < load_limit(segment->capacity))
			return 0;
		if (segment->capacity < SEGMENT_BIG ||
		    (segment->depth == table->depth &&
		     (UINT64_C(2) << table->depth) * DIRECTORY_SHARE > table->totals.pages)) {
			error = segment_grow(table, segment, hash);
		} else {
			error = segment_split(table, segment, hash, SEGMENT_SMALL);
			if (error == -ENOSPC)
				error = segment_split(table, segment, hash, segment->capacity);
		}
		if (error)
			return error;
	}
}

/* Id of a fingerprint, 0 if it is not there. */
static uint32_t index_find(const sa_table *table, uint64_t hash, const uint8_t *fp)
{
	const struct segment *segment = segment_of(table, hash);
	uint32_t like = entry_for(table, hash, 0);
	uint32_t place = place_of(segment, hash);
	uint32_t entry;

	while ((entry = segment->entries[place]) != 0) {
		uint32_t id = entry & table->id_mask;

		if ((entry & ~table->id_mask) == like && memcmp(fp_of(table, id), fp, SA_FP_SIZE) == 0)
			return id;
		place = next_place(segment, place);
	}
	return 0;
}

/* Take out an id that is there. Entries behind it that could not have their place move up, so that no mark is left. */
static void index_remove(sa_table *table, uint32_t id)
{
	uint64_t hash = hash_fp(table, fp_of(table, id));
	struct segment *segment = segment_of(table, hash);
	uint32_t *entries = segment->entries;
	uint32_t hole = place_of(segment, hash);
	uint32_t place;

	while ((entries[hole] & table->id_mask) != id)
		hole = next_place(segment, hole);
	for (place = next_place(segment, hole); entries[place]; place = next_place(segment, place))
		__builtin_prefetch(fp_of(table, entries[place] & table->id_mask));
	for (place = next_place(segment, hole); entries[place]; place = next_place(segment, place)) {
		uint32_t home = place_of(segment, hash_fp(table, fp_of(table, entries[place] & table->id_mask)));

		/* It may move unless its home lies behind the hole, in (hole, place] counted round the end. */
		if (hole <= place ? home <= hole || home > place : home <= hole && home > place) {
			entries[hole] = entries[place];
			hole = place;
		}
	}
	entries[hole] = 0;
	segment->used--;
}

/* Ask for the entries, then for the pages that n <= BATCH fingerprints will most likely lead to. */
static void index_fetch(const sa_table *table, const uint8_t *fps, size_t n, uint64_t *ret_hashes)
{
	for (size_t i = 0; i < n; i++) {
		const struct segment *segment;

		ret_hashes[i] = hash_fp(table, fps + i * SA_FP_SIZE);
		segment = segment_of(table, ret_hashes[i]);
		__builtin_prefetch(&segment->entries[place_of(segment, ret_hashes[i])]);
	}
	for (size_t i = 0; i < n; i++) {
		const struct segment *segment = segment_of(table, ret_hashes[i]);
		uint32_t like = entry_for(table, ret_hashes[i], 0);
		uint32_t place = place_of(segment, ret_hashes[i]);
		uint32_t entry;

		while ((entry = segment->entries[place]) != 0 && (entry & ~table->id_mask) != like)
			place = next_place(segment, place);
		if (entry) {
			__builtin_prefetch(fp_of(table, entry & table->id_mask));
			__builtin_prefetch(state_of(table, entry & table->id_mask), 1);
		}
	}
}

/* ------------------------------------------------------------------------------------------------------- slots */

static uint32_t *page_in(const sa_table *table, uint32_t slot)
{
	return &table->slots[slot >> SLOTS_SHIFT]->page[slot & (SLOTS - 1)];
}

static uint32_t *mappings_of(const sa_table *table, uint32_t slot)
{
	return &table->slots[slot >> SLOTS_SHIFT]->mappings[slot & (SLOTS - 1)];
}

static int slot_has_memory(const sa_table *table, uint32_t slot)
{
	return slot >> SLOTS_SHIFT < table->slots_room && table->slots[slot >> SLOTS_SHIFT];
}

static int add_slots(sa_table *table, uint32_t slot)
{
	size_t chunk = slot >> SLOTS_SHIFT;

	if (slot_has_memory(table, slot))
		return 0;
	if (chunk >= table->slots_room) {
		struct slots **array = longer(table, table->slots, &table->slots_room, chunk + 1);

		if (!array)
			return -ENOMEM;
		table->slots = array;
	}
	table->slots[chunk] = take(table, 1, sizeof(struct slots));
	return table->slots[chunk] ? 0 : -ENOMEM;
}

static void enter_slot(sa_table *table, uint32_t id, uint32_t slot)
{
	*slot_of(table, id) = slot;
	*page_in(table, slot) = id;
	table->totals.slots_used++;
	++*slots_held(table, count_holders(table, id));
}

/* Take a page out of its slot, which it has. Returns 1 if nobody maps that. */
static int leave_slot(sa_table *table, uint32_t id, uint32_t *ret_slot)
{
	uint32_t slot = *slot_of(table, id);

	*slot_of(table, id) = SA_NONE;
	*page_in(table, slot) = LEFT;
	table->totals.slots_used--;
	--*slots_held(table, count_holders(table, id));
	*ret_slot = slot;
	return *mappings_of(table, slot) == 0;
}

/* --------------------------------------------------------------------------------------------- life of a table */

static void table_drop(sa_table **table)
{
	sa_table_destroy(*table);
}

int sa_table_create(const uint8_t *seed, const uint8_t *zero_fp, uint32_t max_holders, uint32_t max_pages,
                    sa_table **ret)
{
	__attribute__((cleanup(table_drop))) sa_table *table = NULL;

	if (max_holders == 0 || max_pages == 0 || max_pages == UINT32_MAX)
		return -EINVAL;
	table = calloc(1, sizeof *table);
	if (!table)
		return -ENOMEM;
	table->totals.memory_bytes = allocated(table);
	memcpy(table->key, seed, sizeof table->key);
	table->max_holders = max_holders;
	table->max_pages = max_pages;
	table->holder_words = ((size_t)max_holders + 63) / 64;
	while (table->id_bits < 32 && max_pages >> table->id_bits)
		table->id_bits++;
	table->id_mask = (uint32_t)((UINT64_C(1) << table->id_bits) - 1);

	table->directory = take(table, 1, sizeof(struct segment *));
	if (!table->directory)
		return -ENOMEM;
	table->directory[0] = segment_create(table, SEGMENT_SMALL, 0);
	if (!table->directory[0] || add_pages(table))
		return -ENOMEM;
	memcpy(fp_of(table, 0), zero_fp, SA_FP_SIZE);
	*state_of(table, 0) = 1;
	*slot_of(table, 0) = SA_NONE;
	table->next_id = 1;
	*ret = table;
	table = NULL;
	return 0;
}

void sa_table_destroy(sa_table *table)
{
	if (!table)
		return;
	for (size_t i = 0; table->directory && i < (size_t)1 << table->depth;) {
		struct segment *segment = table->directory[i];

		i += segment ? (size_t)1 << (table->depth - segment->depth) : 1;
		segment_destroy(table, segment);
	}
	for (size_t i = 0; i < table->pages_room; i++)
		give(table, table->pages[i]);
	for (size_t i = 0; i < table->slots_room; i++)
		give(table, table->slots[i]);
	give(table, table->directory);
	give(table, table->pages);
	give(table, table->slots);
	free(table);
}

/* ----------------------------------------------------------------------------------------- references, holders */

static void recycle(sa_table *table, uint32_t id)
{
	index_remove(table, id);
	give_id(table, id);
}

/* Give back the references of the first n ids, last one first; a page left with nothing is new in this call. */
static void undo_intern(sa_table *table, const uint32_t *ids, size_t n)
{
	while (n-- > 0)
		if (ids[n] && --*state_of(table, ids[n]) == 0)
			recycle(table, ids[n]);
}

/* Find or add one fingerprint. */
static int intern(sa_table *table, const uint8_t *fp, uint64_t hash, uint32_t *ret_id)
{
	uint32_t id = index_find(table, hash, fp);
	int error;

	if (id) {
		uint32_t *state = state_of(table, id);

		if ((*state & REFS_MAX) == REFS_MAX)
			return -ENOSPC;
		++*state;
		*ret_id = id;
		return 0;
	}
	if (memcmp(fp, fp_of(table, 0), SA_FP_SIZE) == 0) {
		*ret_id = 0;
		return 0;
	}
	error = index_reserve(table, hash);
	if (!error)
		error = take_id(table, &id);
	if (error)
		return error;
	memcpy(fp_of(table, id), fp, SA_FP_SIZE);
	*state_of(table, id) = 1;
	segment_insert(segment_of(table, hash), hash, entry_for(table, hash, id));
	*ret_id = id;
	return 0;
}

int sa_table_intern(sa_table *table, const uint8_t *fps, size_t n, uint32_t *ret_ids)
{
	uint64_t hashes[BATCH];

	for (size_t i = 0; i < n; i++) {
		int error;

		if (i % BATCH == 0)
			index_fetch(table, fps + i * SA_FP_SIZE, n - i < BATCH ? n - i : BATCH, hashes);
		error = intern(table, fps + i * SA_FP_SIZE, hashes[i % BATCH], &ret_ids[i]);
		if (error) {
			undo_intern(table, ret_ids, i);
			return error;
		}
	}
	return 0;
}

int sa_table_unref(sa_table *table, const uint32_t *ids, size_t n, uint32_t *ret_freed, size_t *ret_nfreed)
{
	size_t nlost = 0;
	size_t nfreed = 0;

	*ret_nfreed = 0;
	/* ret_freed keeps the pages that lost their last reference until their slots, never more, take their places. */
	for (size_t i = 0; i < n; i++) {
		if (!referenced(table, ids[i])) {
			while (i-- > 0)
				if (ids[i])
					++*state_of(table, ids[i]);
			return -EINVAL;
		}
		if (ids[i] && (--*state_of(table, ids[i]) & REFS_MAX) == 0)
			ret_freed[nlost++] = ids[i];
	}
	for (size_t i = 0; i < nlost; i++) {
		uint32_t id = ret_freed[i];
		uint32_t slot;

		if (*slot_of(table, id) != SA_NONE && leave_slot(table, id, &slot))
			ret_freed[nfreed++] = slot;
		memset(holders_of(table, id), 0, table->holder_words * sizeof(uint64_t));
		if (!(*state_of(table, id) & PENDING))
			recycle(table, id);
	}
	*ret_nfreed = nfreed;
	return 0;
}

/* The bit is another one now: count the page, if it is in a slot, in its new class. */
static void reclass(sa_table *table, uint32_t id, int more)
{
	if (*slot_of(table, id) != SA_NONE) {
		uint32_t nholders = count_holders(table, id);

		--*slots_held(table, more ? nholders - 1 : nholders + 1);
		++*slots_held(table, nholders);
	}
}

int sa_table_mark(sa_table *table, const uint32_t *ids, size_t n, uint32_t holder)
{
	int error = check_referenced(table, ids, n, holder);
	uint64_t bit = UINT64_C(1) << (holder % 64);

	if (error)
		return error;
	for (size_t i = 0; i < n; i++) {
		uint64_t *word = holders_of(table, ids[i]) + holder / 64;

		if (ids[i] && !(*word & bit)) {
			*word |= bit;
			reclass(table, ids[i], 1);
		}
	}
	return 0;
}

int sa_table_unmark(sa_table *table, const uint32_t *ids, size_t n, uint32_t holder)
{
	int error = check_referenced(table, ids, n, holder);
	uint64_t bit = UINT64_C(1) << (holder % 64);

	if (error)
		return error;
	for (size_t i = 0; i < n; i++) {
		uint64_t *word = holders_of(table, ids[i]) + holder / 64;

		if (*word & bit) {
			*word &= ~bit;
			reclass(table, ids[i], 0);
		}
	}
	return 0;
}

int sa_table_forget(sa_table *table, uint32_t holder)
{
	uint64_t bit = UINT64_C(1) << (holder % 64);

	if (holder >= table->max_holders)
		return -EINVAL;
	/* Ids not in use have no holders, so their slot field, which means something else, is not looked at. */
	for (uint32_t id = 1; id < table->next_id; id++) {
		uint64_t *word = holders_of(table, id) + holder / 64;

		if (*word & bit) {
			*word &= ~bit;
			reclass(table, id, 0);
		}
	}
	return 0;
}

/* ------------------------------------------------------------------------------------------------- publication */

int sa_table_want(sa_table *table, const uint32_t *ids, size_t n, uint32_t k, uint32_t *ret_positions, size_t *ret_n)
{
	size_t nwanted = 0;

	*ret_n = 0;
	if (n > UINT32_MAX || check_known(table, ids, n))
		return -EINVAL;
	for (size_t i = 0; i < n; i++) {
		uint32_t *state = state_of(table, ids[i]);

		if (ids[i] && !(*state & PENDING) && *slot_of(table, ids[i]) == SA_NONE &&
		    count_holders(table, ids[i]) >= k) {
			*state |= PENDING;
			ret_positions[nwanted++] = (uint32_t)i;
		}
	}
	table->totals.pending += nwanted;
	*ret_n = nwanted;
	return 0;
}

/* Returns 1 if the page has no references, and so has gone. */
static int end_pending(sa_table *table, uint32_t id)
{
	uint32_t *state = state_of(table, id);

	if (!(*state & PENDING))
		return *state == 0;
	*state &= ~PENDING;
	table->totals.pending--;
	if (*state)
		return 0;
	recycle(table, id);
	return 1;
}

int sa_table_unwant(sa_table *table, const uint32_t *ids, size_t n)
{
	if (check_known(table, ids, n))
		return -EINVAL;
	for (size_t i = 0; i < n; i++)
		end_pending(table, ids[i]);
	return 0;
}

/* Look at one page and slot of a publication, and claim the slot. */
static int claim_slot(sa_table *table, uint32_t id, uint32_t slot)
{
	int error;

	if (id == 0 || slot == SA_NONE || !known(table, id))
		return -EINVAL;
	error = add_slots(table, slot);
	if (error)
		return error;
	if ((*page_in(table, slot) != NEVER && *page_in(table, slot) != LEFT) || *mappings_of(table, slot) != 0)
		return -EEXIST;
	*mappings_of(table, slot) = CLAIMED;
	return 0;
}

int sa_table_publish(sa_table *table, const uint32_t *ids, const uint32_t *slots, size_t n, uint32_t *ret_freed,
                     size_t *ret_nfreed)
{
	size_t nfreed = 0;

	*ret_nfreed = 0;
	for (size_t i = 0; i < n; i++) {
		int error = claim_slot(table, ids[i], slots[i]);

		if (error) {
			while (i-- > 0)
				*mappings_of(table, slots[i]) = 0;
			return error;
		}
	}
	for (size_t i = 0; i < n; i++) {
		uint32_t left;

		*mappings_of(table, slots[i]) = 0;
		if (end_pending(table, ids[i])) {
			ret_freed[nfreed++] = slots[i];
			continue;
		}
		if (*slot_of(table, ids[i]) != SA_NONE && leave_slot(table, ids[i], &left))
			ret_freed[nfreed++] = left;
		enter_slot(table, ids[i], slots[i]);
	}
	*ret_nfreed = nfreed;
	return 0;
}

/* ------------------------------------------------------------------------------------------------------ asking */

int sa_table_fps(const sa_table *table, const uint32_t *ids, size_t n, uint8_t *ret_fps)
{
	for (size_t i = 0; i < n; i++) {
		if (!known(table, ids[i]))
			return -EINVAL;
		memcpy(ret_fps + i * SA_FP_SIZE, fp_of(table, ids[i]), SA_FP_SIZE);
	}
	return 0;
}

int sa_table_slots(const sa_table *table, const uint32_t *ids, size_t n, uint32_t *ret_slots)
{
	for (size_t i = 0; i < n; i++) {
		if (!known(table, ids[i]))
			return -EINVAL;
		ret_slots[i] = *slot_of(table, ids[i]);
	}
	return 0;
}

int sa_table_count(sa_table *table, const uint32_t *ids, size_t n, uint64_t *ret_zero, uint64_t *ret_in_slot,
                   uint64_t *ret_repeated)
{
	uint64_t zero = 0;
	uint64_t in_slot = 0;
	uint64_t repeated = 0;

	if (check_known(table, ids, n))
		return -EINVAL;
	for (size_t i = 0; i < n; i++) {
		uint32_t *state = state_of(table, ids[i]);

		if (ids[i] == 0) {
			zero++;
			continue;
		}
		if (*slot_of(table, ids[i]) != SA_NONE)
			in_slot++;
		if (*state & SEEN)
			repeated++;
		*state |= SEEN;
	}
	for (size_t i = 0; i < n; i++)
		*state_of(table, ids[i]) &= ~SEEN;
	*ret_zero = zero;
	*ret_in_slot = in_slot;
	*ret_repeated = repeated;
	return 0;
}

/* 1 if a page of this number in this slot makes the run longer. */
static int continues(const uint32_t *run, uint32_t page, uint32_t slot, uint32_t slots_per_segment)
{
	return page == (uint64_t)run[0] + run[2] && slot == (uint64_t)run[1] + run[2] && slot % slots_per_segment != 0;
}

int sa_table_runs(const sa_table *table, const uint32_t *ids, const uint32_t *pages, size_t n,
                  uint32_t slots_per_segment, uint32_t *ret_runs, size_t *ret_nruns)
{
	size_t nruns = 0;

	*ret_nruns = 0;
	if (slots_per_segment == 0 || n > UINT32_MAX)
		return -EINVAL;
	for (size_t i = 0; i < n; i++) {
		uint32_t page = pages ? pages[i] : (uint32_t)i;
		uint32_t slot;

		if (!known(table, ids[i]))
			return -EINVAL;
		slot = *slot_of(table, ids[i]);
		if (slot == SA_NONE)
			continue;
		if (nruns && continues(&ret_runs[3 * (nruns - 1)], page, slot, slots_per_segment)) {
			ret_runs[3 * (nruns - 1) + 2]++;
		} else {
			ret_runs[3 * nruns] = page;
			ret_runs[3 * nruns + 1] = slot;
			ret_runs[3 * nruns + 2] = 1;
			nruns++;
		}
	}
	*ret_nruns = nruns;
	return 0;
}

/* ---------------------------------------------------------------------------------------------------- mappings */

static int map_slot(sa_table *table, uint64_t slot)
{
	uint32_t *mappings;

	if (slot > UINT32_MAX || !slot_has_memory(table, (uint32_t)slot) || *page_in(table, (uint32_t)slot) == NEVER)
		return -ERANGE;
	mappings = mappings_of(table, (uint32_t)slot);
	if (*mappings == MAPPINGS_MAX)
		return -EINVAL;
	if (*mappings == 0)
		table->totals.slots_mapped++;
	else
		table->totals.by_mappings[class_of(*mappings) - 1]--;
	table->totals.by_mappings[class_of(++*mappings) - 1]++;
	table->totals.mappings++;
	return 0;
}

/* *ret_freed: 1 if nobody maps the slot now, and no page uses it. */
static int unmap_slot(sa_table *table, uint64_t slot, int *ret_freed)
{
	uint32_t *mappings;

	if (slot > UINT32_MAX || !slot_has_memory(table, (uint32_t)slot) || *page_in(table, (uint32_t)slot) == NEVER)
		return -ERANGE;
	mappings = mappings_of(table, (uint32_t)slot);
	if (*mappings == 0)
		return -EINVAL;
	table->totals.by_mappings[class_of(*mappings) - 1]--;
	if (--*mappings == 0)
		table->totals.slots_mapped--;
	else
		table->totals.by_mappings[class_of(*mappings) - 1]++;
	table->totals.mappings--;
	*ret_freed = *mappings == 0 && *page_in(table, (uint32_t)slot) == LEFT;
	return 0;
}

/* Map (or unmap) again what was unmapped (or mapped): all runs before the last of nruns, and count slots of that. These
 * slots were just counted the other way, so neither can fail. */
static void undo_mappings(sa_table *table, const uint32_t *runs, size_t nruns, uint32_t count, int map)
{
	int freed;

	for (size_t run = 0; run < nruns; run++) {
		uint64_t first = runs[3 * run + 1];
		uint64_t end = first + (run + 1 == nruns ? count : runs[3 * run + 2]);

		for (uint64_t slot = first; slot < end; slot++) {
			if (map)
				(void)map_slot(table, slot);
			else
				(void)unmap_slot(table, slot, &freed);
		}
	}
}

int sa_table_map(sa_table *table, const uint32_t *runs, size_t nruns)
{
	for (size_t run = 0; run < nruns; run++) {
		for (uint32_t i = 0; i < runs[3 * run + 2]; i++) {
			int error = map_slot(table, (uint64_t)runs[3 * run + 1] + i);

			if (error) {
				undo_mappings(table, runs, run + 1, i, 0);
				return error;
			}
		}
	}
	return 0;
}

int sa_table_unmap(sa_table *table, const uint32_t *runs, size_t nruns, uint32_t *ret_freed, size_t *ret_nfreed)
{
	size_t nfreed = 0;

	*ret_nfreed = 0;
	for (size_t run = 0; run < nruns; run++) {
		for (uint32_t i = 0; i < runs[3 * run + 2]; i++) {
			int freed;
			int error = unmap_slot(table, (uint64_t)runs[3 * run + 1] + i, &freed);

			if (error) {
				undo_mappings(table, runs, run + 1, i, 1);
				return error;
			}
			if (freed)
				ret_freed[nfreed++] = runs[3 * run + 1] + i;
		}
	}
	*ret_nfreed = nfreed;
	return 0;
}

/* The sum fits: 2^40 slots would have to be named for 64 bits of it, and nobody waits for as many. */
int sa_table_share(const sa_table *table, const uint32_t *runs, size_t nruns, uint64_t *ret_share)
{
	uint64_t share = 0;

	for (size_t run = 0; run < nruns; run++) {
		uint64_t slot = runs[3 * run + 1];

		for (uint64_t end = slot + runs[3 * run + 2]; slot < end; slot++) {
			uint32_t mappings;

			if (slot > UINT32_MAX || !slot_has_memory(table, (uint32_t)slot) ||
			    *page_in(table, (uint32_t)slot) == NEVER)
				return -ERANGE;
			mappings = *mappings_of(table, (uint32_t)slot);
			if (mappings == 0)
				return -EINVAL;
			share += (uint32_t)SA_SHARE_PAGE / mappings;
		}
	}
	*ret_share = share;
	return 0;
}

int sa_table_live(const sa_table *table, uint32_t first, size_t n, uint32_t *ret_slots, uint32_t *ret_ids,
                  size_t *ret_n, uint64_t *ret_mapped)
{
	uint64_t end = (uint64_t)table->slots_room << SLOTS_SHIFT;
	uint64_t mapped = 0;
	size_t nlive = 0;

	if (first >= end)
		end = first;
	else if (n < end - first)
		end = first + n;
	for (uint64_t at = first; at < end; at++) {
		uint32_t slot = (uint32_t)at;
		uint32_t id;

		if (!slot_has_memory(table, slot)) {
			at |= SLOTS - 1;
			continue;
		}
		id = *page_in(table, slot);
		mapped += *mappings_of(table, slot);
		if (id != NEVER && id != LEFT) {
			ret_slots[nlive] = slot;
			ret_ids[nlive] = id;
			nlive++;
		}
	}
	*ret_n = nlive;
	*ret_mapped = mapped;
	return 0;
}

int sa_table_totals(const sa_table *table, struct sa_table_totals *ret)
{
	*ret = table->totals;
	return 0;
}

int sa_table_census(const sa_table *table, uint32_t first, size_t n, uint32_t k, uint64_t *ret_held,
                    uint64_t *ret_common, uint64_t *ret_share, struct sa_table_census *ret)
{
	uint64_t end = n < table->next_id - (uint64_t)first ? first + (uint64_t)n : table->next_id;
	struct sa_table_census census = {.end = table->next_id};

	if (first > table->next_id)
		end = first;
	for (size_t holder = 0; holder < table->max_holders; holder++)
		ret_held[holder] = ret_common[holder] = ret_share[holder] = 0;
	for (uint64_t at = first; at < end; at++) {
		uint32_t id = (uint32_t)at;
		const uint64_t *holders;
		uint32_t nholders;
		uint64_t common; /* 0 or 1 */

		if (id == 0 || !referenced(table, id))
			continue;
		nholders = count_holders(table, id);
		common = nholders >= k && nholders > 0 ? 1 : 0;
		census.common += common;
		census.copies += common * nholders;
		holders = holders_of(table, id);
		for (size_t word = 0; word < table->holder_words; word++) {
			for (uint64_t left = holders[word]; left; left &= left - 1) {
				size_t holder = word * 64 + (size_t)__builtin_ctzll(left);

				ret_held[holder]++;
				ret_common[holder] += common;
				ret_share[holder] += common * ((uint32_t)SA_SHARE_PAGE / nholders);
			}
		}
	}
	*ret = census;
	return 0;
}
