/*
 * estimate.c - what several roots have in common, page by page, before anything is mapped: the tally of `sharearea
 * estimate`.
 *
 * Every page becomes a record of 24 bytes: half of its fingerprint, the file and the root it is in, its class. Records
 * are spread by their fingerprint over SA_TALLY_PARTS parts; what does not fit into a part's block goes to the caller's
 * file, block by block. Afterwards one part at a time is read back, sorted and counted: equal pages are in the same part,
 * whichever root they are in. So memory is bounded by the blocks and one part's distinct pages, never by the bytes read.
 *
 * 16 bytes of a keyed BLAKE3 tell pages apart here: among 2^32 pages two different ones are taken for equal with a
 * probability of 2^-65, and nobody maps anything because of it. What is mapped is compared by 32 bytes (hash.c).
 *
 * Left to the caller: which files there are, which package a file is of, and what becomes of the counts
 * (sharearea/estimate). Nothing that is read here is trusted: ELF headers are bounded before they are used.
 */
#include "sa.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
	BLOCK_RECORDS = 1024, /* records of a part that are written together: 24 KiB */
	READ_PAGES = 64,      /* pages that are read and hashed together: 256 KiB stay in a processor's cache */
	SEGMENTS = 64,        /* ELF segments of one file that are told apart; programs have four to ten */
	FIRST_ENTRIES = 4 * BLOCK_RECORDS
};

_Static_assert((SA_TALLY_PARTS & (SA_TALLY_PARTS - 1)) == 0, "a part is some bits of the fingerprint");

/* One page, as it lies in a block and in the file. */
struct record {
	uint64_t fp[2];
	uint32_t file;
	uint16_t root;
	uint8_t class_; /* SA_CLASS_* */
	uint8_t unused;
};
_Static_assert(sizeof(struct record) == 24, "no gaps");

/* All pages of one root with one fingerprint, text and not text apart. */
struct entry {
	uint64_t fp[2];
	uint64_t count;
	uint32_t file;  /* the lowest of them, and */
	uint16_t root;  /* the class there */
	uint8_t class_; /* SA_CLASS_* */
	uint8_t text;   /* class_ == SA_CLASS_TEXT */
};

struct part {
	struct record *block; /* BLOCK_RECORDS of room, or NULL */
	size_t nrecords;      /* in block */
	uint64_t *blocks;     /* numbers of full blocks in the file */
	size_t nblocks;
	size_t room;
};

/* Pages [first, end) of the file are mapped with this class by whoever runs or loads it. */
struct segment {
	uint64_t first;
	uint64_t end;
	uint8_t class_;
};

struct sa_tally {
	uint8_t key[SA_FP_SIZE];
	int fd;
	uint64_t nblocks; /* in the file */
	uint32_t nroots;
	struct sa_tally_root *roots;
	struct part parts[SA_TALLY_PARTS];

	/* the file that is being fed */
	int open;
	uint32_t file;
	uint32_t root;
	uint64_t page; /* the next one */
	size_t npending;
	struct segment segments[SEGMENTS];
	size_t nsegments;
	uint8_t pending[SA_PAGE_SIZE]; /* npending bytes of that page */

	uint8_t *buffer; /* READ_PAGES pages */
};

/* ------------------------------------------------------------------------------------------------- lifetime */

static void tally_drop(sa_tally **tally)
{
	sa_tally_destroy(*tally);
}

int sa_tally_create(int fd, const uint8_t *key, uint32_t nroots, sa_tally **ret)
{
	__attribute__((cleanup(tally_drop))) sa_tally *tally = NULL;

	if (!key || !ret || nroots == 0 || nroots > UINT16_MAX)
		return -EINVAL;
	tally = calloc(1, sizeof *tally);
	if (!tally)
		return -ENOMEM;
	tally->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	if (tally->fd < 0)
		return -errno;
	memcpy(tally->key, key, sizeof tally->key);
	tally->nroots = nroots;
	tally->roots = calloc(nroots, sizeof *tally->roots);
	tally->buffer = malloc((size_t)READ_PAGES * SA_PAGE_SIZE);
	if (!tally->roots || !tally->buffer)
		return -ENOMEM;
	*ret = tally;
	tally = NULL;
	return 0;
}

void sa_tally_destroy(sa_tally *tally)
{
	if (!tally)
		return;
	for (size_t i = 0; i < SA_TALLY_PARTS; i++) {
		free(tally->parts[i].block);
		free(tally->parts[i].blocks);
	}
	if (tally->fd > 0)
		close(tally->fd);
	free(tally->roots);
	free(tally->buffer);
	free(tally);
}

/* ---------------------------------------------------------------------------------------------- page classes */

/* A field of an ELF header in the file's own byte order; size is 2, 4 or 8. */
static uint64_t elf_field(const uint8_t *at, size_t size, int big_endian)
{
	uint64_t value = 0;

	for (size_t i = 0; i < size; i++)
		value |= (uint64_t)at[big_endian ? size - 1 - i : i] << (8 * i);
	return value;
}

/* Find the loaded segments of an ELF program or library by its first size bytes. UNTRUSTED: all of them. A file that is
 * none, or whose program headers lie further on, has no segments: its pages are plain data. */
static size_t find_segments(const uint8_t *data, size_t size, struct segment *ret)
{
	enum { PT_LOAD = 1, PF_X = 1, PF_W = 2, PF_R = 4, ET_EXEC = 2, ET_DYN = 3 };
	const int is64 = size > 4 && data[4] == 2;
	const int big = size > 5 && data[5] == 2;
	const size_t word = is64 ? 8 : 4;
	size_t n = 0;
	uint64_t type;
	uint64_t offset;
	uint64_t entry_size;
	uint64_t count;

	if (size < 64 || memcmp(data, "\177ELF", 4) != 0 || data[4] < 1 || data[4] > 2 || data[5] < 1 || data[5] > 2)
		return 0;
	type = elf_field(data + 16, 2, big);
	offset = elf_field(data + (is64 ? 32 : 28), word, big);
	entry_size = elf_field(data + (is64 ? 54 : 42), 2, big);
	count = elf_field(data + (is64 ? 56 : 44), 2, big);
	if ((type != ET_EXEC && type != ET_DYN) || entry_size < (is64 ? 56 : 32))
		return 0;
	if (offset > size || count * entry_size > size - offset)
		return 0;
	for (uint64_t i = 0; i < count && n < SEGMENTS; i++) {
		const uint8_t *header = data + offset + i * entry_size;
		const uint64_t flags = elf_field(header + (is64 ? 4 : 24), 4, big);
		const uint64_t start = elf_field(header + (is64 ? 8 : 4), word, big);
		const uint64_t length = elf_field(header + (is64 ? 32 : 16), word, big);

		if (elf_field(header, 4, big) != PT_LOAD || length == 0 || length > UINT64_MAX - SA_PAGE_SIZE - start)
			continue;
		if (start > UINT64_MAX - SA_PAGE_SIZE || (!(flags & PF_X) && ((flags & PF_W) || !(flags & PF_R))))
			continue;
		ret[n].first = start / SA_PAGE_SIZE;
		ret[n].end = (start + length + SA_PAGE_SIZE - 1) / SA_PAGE_SIZE;
		ret[n].class_ = flags & PF_X ? SA_CLASS_TEXT : SA_CLASS_RODATA;
		n++;
	}
	return n;
}

/* The strongest class of a page: one that lies in two segments is mapped twice, and once is enough to be text. */
static uint8_t class_of(const sa_tally *tally, uint64_t page)
{
	uint8_t class_ = SA_CLASS_DATA;

	_Static_assert(SA_CLASS_TEXT > SA_CLASS_RODATA && SA_CLASS_RODATA > SA_CLASS_DATA, "stronger is greater");
	for (size_t i = 0; i < tally->nsegments; i++) {
		const struct segment *segment = &tally->segments[i];

		if (page >= segment->first && page < segment->end && segment->class_ > class_)
			class_ = segment->class_;
	}
	return class_;
}

/* ---------------------------------------------------------------------------------------------------- records */

static int write_all(int fd, const void *data, size_t size, uint64_t offset)
{
	const uint8_t *from = data;

	while (size > 0) {
		const ssize_t n = pwrite(fd, from, size, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		from += n;
		offset += (uint64_t)n;
		size -= (size_t)n;
	}
	return 0;
}

static int read_all(int fd, void *ret, size_t size, uint64_t offset)
{
	uint8_t *to = ret;

	while (size > 0) {
		const ssize_t n = pread(fd, to, size, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		to += n;
		offset += (uint64_t)n;
		size -= (size_t)n;
	}
	return 0;
}

/* Move a full block to the file. */
static int flush_block(sa_tally *tally, struct part *part)
{
	const size_t bytes = BLOCK_RECORDS * sizeof *part->block;
	int error;

	if (part->nblocks == part->room) {
		const size_t room = part->room ? 2 * part->room : 16;
		uint64_t *blocks = realloc(part->blocks, room * sizeof *blocks);

		if (!blocks)
			return -ENOMEM;
		part->blocks = blocks;
		part->room = room;
	}
	/* Whatever goes wrong with the caller's file is said in one way, which no file that is read gives. */
	error = write_all(tally->fd, part->block, bytes, tally->nblocks * bytes);
	if (error)
		return -ENOSPC;
	part->blocks[part->nblocks++] = tally->nblocks++;
	part->nrecords = 0;
	return 0;
}

static int add_record(sa_tally *tally, const uint8_t *fp, uint8_t class_)
{
	struct record record = {.file = tally->file, .root = (uint16_t)tally->root, .class_ = class_};
	struct part *part;

	memcpy(record.fp, fp, sizeof record.fp);
	part = &tally->parts[record.fp[0] & (SA_TALLY_PARTS - 1)];
	if (!part->block) {
		part->block = malloc(BLOCK_RECORDS * sizeof *part->block);
		if (!part->block)
			return -ENOMEM;
	}
	if (part->nrecords == BLOCK_RECORDS) {
		const int error = flush_block(tally, part);

		if (error)
			return error;
	}
	part->block[part->nrecords++] = record;
	return 0;
}

/* Hash whole pages, which are the file's next ones. */
static int add_pages(sa_tally *tally, const uint8_t *pages, size_t npages)
{
	struct sa_tally_root *root = &tally->roots[tally->root];
	uint8_t fps[READ_PAGES * SA_FP_SIZE];
	uint8_t zero[READ_PAGES];

	for (size_t done = 0; done < npages;) {
		const size_t n = npages - done < READ_PAGES ? npages - done : READ_PAGES;
		int error = sa_fingerprint_pages(tally->key, pages + done * SA_PAGE_SIZE, n, fps, zero);

		for (size_t i = 0; i < n && !error; i++) {
			const uint8_t class_ = class_of(tally, tally->page);

			if (!zero[i])
				error = add_record(tally, fps + i * SA_FP_SIZE, class_);
			if (error)
				break;
			root->pages++;
			if (zero[i])
				root->zero++;
			else
				root->by_class[class_]++;
			tally->page++;
		}
		if (error)
			return error;
		done += n;
	}
	return 0;
}

/* ------------------------------------------------------------------------------------------------------ files */

int sa_tally_begin(sa_tally *tally, uint32_t root, uint32_t file)
{
	if (!tally || root >= tally->nroots || tally->open)
		return -EINVAL;
	tally->open = 1;
	tally->root = root;
	tally->file = file;
	tally->page = 0;
	tally->npending = 0;
	tally->nsegments = 0;
	tally->roots[root].files++;
	return 0;
}

int sa_tally_feed(sa_tally *tally, const uint8_t *data, size_t size)
{
	int error = 0;

	if (!tally || !tally->open || (!data && size > 0))
		return -EINVAL;
	if (size == 0)
		return 0;
	if (tally->page == 0 && tally->npending == 0)
		tally->nsegments = find_segments(data, size, tally->segments);
	if (tally->npending > 0) {
		const size_t rest = SA_PAGE_SIZE - tally->npending;
		const size_t n = size < rest ? size : rest;

		memcpy(tally->pending + tally->npending, data, n);
		tally->npending += n;
		data += n;
		size -= n;
		if (tally->npending < SA_PAGE_SIZE)
			return 0;
		tally->npending = 0;
		error = add_pages(tally, tally->pending, 1);
	}
	if (!error)
		error = add_pages(tally, data, size / SA_PAGE_SIZE);
	if (error)
		return error;
	tally->npending = size % SA_PAGE_SIZE;
	memcpy(tally->pending, data + size - tally->npending, tally->npending);
	return 0;
}

int sa_tally_hole(sa_tally *tally, uint64_t size)
{
	static const uint8_t zeros[SA_PAGE_SIZE];
	struct sa_tally_root *root;

	if (!tally || !tally->open)
		return -EINVAL;
	root = &tally->roots[tally->root];
	if (tally->npending > 0) {
		const uint64_t rest = SA_PAGE_SIZE - tally->npending;
		const size_t n = (size_t)(size < rest ? size : rest);
		const int error = sa_tally_feed(tally, zeros, n);

		if (error)
			return error;
		size -= n;
	}
	root->pages += size / SA_PAGE_SIZE;
	root->zero += size / SA_PAGE_SIZE;
	tally->page += size / SA_PAGE_SIZE;
	/* No feed: at the start of a file that would look for an ELF header. */
	tally->npending += (size_t)(size % SA_PAGE_SIZE);
	memset(tally->pending + tally->npending - size % SA_PAGE_SIZE, 0, (size_t)(size % SA_PAGE_SIZE));
	return 0;
}

/* Feed [offset, end), which has no hole that matters. *ret_fed grows. */
static int feed_data(sa_tally *tally, int fd, uint64_t offset, uint64_t end, uint64_t *ret_fed)
{
	const uint64_t most = (uint64_t)READ_PAGES * SA_PAGE_SIZE;

	while (offset < end) {
		const size_t want = (size_t)(end - offset < most ? end - offset : most);
		size_t got = 0;
		int error;

		/* Whole pieces: a page that is cut would be copied once more, and ELF headers are in the first one. */
		while (got < want) {
			const ssize_t n = pread(fd, tally->buffer + got, want - got, (off_t)(offset + got));

			if (n < 0 && errno == EINTR)
				continue;
			if (n < 0)
				return -errno;
			if (n == 0)
				break;
			got += (size_t)n;
		}
		error = sa_tally_feed(tally, tally->buffer, got);
		if (error)
			return error;
		*ret_fed += got;
		offset += got;
		if (got < want)
			return 0;
	}
	return 0;
}

/* The first data of [offset, end): [*ret_data, *ret_hole), empty where there is none any more. */
static int next_data(int fd, uint64_t offset, uint64_t end, uint64_t *ret_data, uint64_t *ret_hole)
{
	const off_t data = lseek(fd, (off_t)offset, SEEK_DATA);
	off_t hole;

	*ret_data = offset;
	*ret_hole = end;
	if (data < 0 && errno == ENXIO) {
		struct stat status;

		/* A hole up to the end of the file, or past that end already. */
		if (fstat(fd, &status))
			return -errno;
		if ((uint64_t)status.st_size > offset)
			*ret_data = (uint64_t)status.st_size < end ? (uint64_t)status.st_size : end;
		*ret_hole = *ret_data;
		return 0;
	}
	if (data < 0)
		return 0; /* this file system does not tell, or it is a device: all of it is data */
	*ret_data = (uint64_t)data < end ? (uint64_t)data : end;
	hole = lseek(fd, data, SEEK_HOLE);
	if (hole >= data && (uint64_t)hole < end)
		*ret_hole = (uint64_t)hole;
	return 0;
}

int sa_tally_feed_fd(sa_tally *tally, int fd, uint64_t offset, uint64_t size, int sparse, uint64_t *ret_fed)
{
	uint64_t end;

	if (!tally || !tally->open || !ret_fed || offset > INT64_MAX || size > INT64_MAX - offset)
		return -EINVAL;
	*ret_fed = 0;
	for (end = offset + size; offset < end;) {
		uint64_t data = offset;
		uint64_t hole = end;
		uint64_t fed = 0;
		int error = sparse ? next_data(fd, offset, end, &data, &hole) : 0;

		if (!error)
			error = sa_tally_hole(tally, data - offset);
		if (error)
			return error;
		*ret_fed += data - offset;
		error = feed_data(tally, fd, data, hole, &fed);
		*ret_fed += fed;
		if (error)
			return error;
		if (hole == data || fed < hole - data)
			return 0; /* the file ends here, whatever the caller knew of it */
		offset = hole;
	}
	return 0;
}

int sa_tally_end(sa_tally *tally)
{
	int error = 0;

	if (!tally || !tally->open)
		return -EINVAL;
	if (tally->npending > 0) {
		memset(tally->pending + tally->npending, 0, SA_PAGE_SIZE - tally->npending);
		tally->npending = 0;
		error = add_pages(tally, tally->pending, 1);
	}
	tally->open = 0;
	return error;
}

int sa_tally_abandon(sa_tally *tally)
{
	if (!tally || !tally->open)
		return -EINVAL;
	tally->open = 0;
	return 0;
}

int sa_tally_file(sa_tally *tally, uint32_t root, uint32_t file, int fd, uint64_t size, int sparse, uint64_t *ret_fed)
{
	int error = sa_tally_begin(tally, root, file);

	if (error)
		return error;
	error = sa_tally_feed_fd(tally, fd, 0, size, sparse, ret_fed);
	if (error) {
		tally->open = 0;
		return error;
	}
	return sa_tally_end(tally);
}

int sa_tally_root(const sa_tally *tally, uint32_t root, struct sa_tally_root *ret)
{
	if (!tally || !ret || root >= tally->nroots)
		return -EINVAL;
	*ret = tally->roots[root];
	return 0;
}

int sa_tally_spilled(const sa_tally *tally, uint64_t *ret_bytes)
{
	if (!tally || !ret_bytes)
		return -EINVAL;
	*ret_bytes = tally->nblocks * BLOCK_RECORDS * sizeof(struct record);
	return 0;
}

/* ------------------------------------------------------------------------------------------------- counting */

/* Entries of one part, and what was made of them. */
struct join {
	struct entry *entries;
	size_t n;
	size_t room;
};

static void join_deinit(struct join *join)
{
	free(join->entries);
}

static void free_bytes(void **bytes)
{
	free(*bytes);
}

static int compare_entries(const void *a, const void *b)
{
	const struct entry *x = a;
	const struct entry *y = b;

	if (x->fp[0] != y->fp[0])
		return x->fp[0] < y->fp[0] ? -1 : 1;
	if (x->fp[1] != y->fp[1])
		return x->fp[1] < y->fp[1] ? -1 : 1;
	if (x->root != y->root)
		return x->root < y->root ? -1 : 1;
	if (x->text != y->text)
		return x->text < y->text ? -1 : 1;
	if (x->file != y->file)
		return x->file < y->file ? -1 : 1;
	/* Two places of one file: the weaker class, so that the answer does not depend on the order of reading. */
	return (x->class_ > y->class_) - (x->class_ < y->class_);
}

static int same_fp(const struct entry *x, const struct entry *y)
{
	return x->fp[0] == y->fp[0] && x->fp[1] == y->fp[1];
}

/* Sort, and make one entry of those of the same page, root and textness: the first file of them stays. */
static void merge_entries(struct join *join)
{
	size_t n = 0;

	if (join->n > 1)
		qsort(join->entries, join->n, sizeof *join->entries, compare_entries);
	for (size_t i = 0; i < join->n; i++) {
		const struct entry *entry = &join->entries[i];
		struct entry *last = n > 0 ? &join->entries[n - 1] : NULL;

		if (last && same_fp(last, entry) && last->root == entry->root && last->text == entry->text)
			last->count += entry->count;
		else
			join->entries[n++] = *entry;
	}
	join->n = n;
}

/* Make room for more entries: by merging what is there, and if that wins too little, by growing. So a page that one
 * root has a billion times costs no more than any other. */
static int make_room(struct join *join, size_t more)
{
	size_t room = join->room ? join->room : FIRST_ENTRIES;
	struct entry *entries;

	if (join->n + more <= join->room)
		return 0;
	merge_entries(join);
	if (join->room && join->n + more <= join->room / 2)
		return 0;
	while (room / 2 < join->n + more) {
		if (room > SIZE_MAX / 2 / sizeof *entries)
			return -ENOMEM;
		room *= 2;
	}
	entries = realloc(join->entries, room * sizeof *entries);
	if (!entries)
		return -ENOMEM;
	join->entries = entries;
	join->room = room;
	return 0;
}

static int take_records(struct join *join, const struct record *records, size_t n)
{
	const int error = make_room(join, n);

	if (error)
		return error;
	for (size_t i = 0; i < n; i++) {
		const struct record *record = &records[i];

		join->entries[join->n++] = (struct entry){
			.fp = {record->fp[0], record->fp[1]},
			.count = 1,
			.file = record->file,
			.root = record->root,
			.class_ = record->class_,
			.text = record->class_ == SA_CLASS_TEXT,
		};
	}
	return 0;
}

/* Roots that hold a page, each with the chance that it does; whoever has the smaller chance holds the page only when the
 * others do too. So all but the greatest chance is gained, and the second one is that of a page in the area. */
struct gain {
	uint64_t sum;
	uint64_t greatest;
	uint64_t second;
};

static void gain_add(struct gain *gain, uint64_t weight)
{
	gain->sum += weight;
	if (weight > gain->greatest) {
		gain->second = gain->greatest;
		gain->greatest = weight;
	} else if (weight > gain->second) {
		gain->second = weight;
	}
}

/* What one call of sa_tally_join counts with and into. */
struct counting {
	const struct sa_tally_question *question;
	uint32_t nroots;
	uint32_t *members; /* nroots of room: roots that hold the page */
	struct sa_tally_sums *sums;
	uint64_t *repeated;
	uint64_t *pairs;
	uint64_t *groups;
};

static void add_pairs(const struct counting *counting, size_t nmembers)
{
	const uint32_t *weights = counting->question->weights;

	for (size_t i = 0; i + 1 < nmembers; i++) {
		const uint32_t a = counting->members[i];
		uint64_t *row = counting->pairs + (size_t)a * counting->nroots;

		for (size_t j = i + 1; j < nmembers; j++) {
			const uint32_t b = counting->members[j];

			row[b] += weights[a] < weights[b] ? weights[a] : weights[b];
		}
	}
}

/* Count one page by its n entries, which are in the order of roots, and in each root text after the rest. */
static int count_page(const struct counting *counting, const struct entry *entries, size_t n)
{
	const struct sa_tally_question *question = counting->question;
	struct sa_tally_sums *sums = counting->sums;
	struct gain all = {0};  /* whatever the pages are mapped as */
	struct gain rest = {0}; /* without text */
	const struct entry *first = NULL;
	const struct entry *first_rest = NULL;
	uint64_t repeated = 0;
	size_t nmembers = 0;
	uint64_t gained;

	for (size_t i = 0; i < n; i++) {
		const struct entry *entry = &entries[i];
		const uint64_t weight = question->weights[entry->root];
		const int again = i > 0 && entries[i - 1].root == entry->root;
		const int counts = !(entry->text && question->without_text);

		if (entry->file >= question->nfiles || question->groups[entry->file] >= question->ngroups)
			return -ERANGE;
		counting->repeated[entry->root] += entry->count - (again ? 0 : 1);
		if (!again)
			gain_add(&all, weight);
		if (!entry->text) {
			gain_add(&rest, weight);
			if (!first_rest || entry->file < first_rest->file)
				first_rest = entry;
		}
		if (!counts)
			continue;
		if (!first || entry->file < first->file)
			first = entry;
		if (nmembers == 0 || counting->members[nmembers - 1] != entry->root) {
			counting->members[nmembers++] = entry->root;
			repeated += (entry->count - 1) * weight;
		} else {
			repeated += entry->count * weight;
		}
	}
	sums->distinct++;
	sums->saved[SA_CLASS_TEXT] += all.sum - all.greatest - (rest.sum - rest.greatest);
	if (first_rest)
		sums->saved[first_rest->class_] += rest.sum - rest.greatest;
	if (nmembers < 2)
		return 0;
	gained = question->without_text ? rest.sum - rest.greatest : all.sum - all.greatest;
	sums->area += question->without_text ? rest.second : all.second;
	sums->repeated += repeated;
	counting->groups[question->groups[first->file]] += gained;
	add_pairs(counting, nmembers);
	return 0;
}

int sa_tally_join(const sa_tally *tally, uint32_t part_number, const struct sa_tally_question *question,
                  struct sa_tally_sums *ret_sums, uint64_t *ret_repeated, uint64_t *ret_pairs, uint64_t *ret_groups)
{
	__attribute__((cleanup(join_deinit))) struct join join = {0};
	__attribute__((cleanup(free_bytes))) void *bytes = NULL;
	__attribute__((cleanup(free_bytes))) void *members = NULL;
	struct counting counting = {question, 0, NULL, ret_sums, ret_repeated, ret_pairs, ret_groups};
	const struct part *part;
	int error = 0;

	if (!tally || part_number >= SA_TALLY_PARTS || !question || !question->weights || !ret_sums || !ret_repeated ||
	    !ret_pairs || !ret_groups || (!question->groups && question->nfiles > 0))
		return -EINVAL;
	for (uint32_t i = 0; i < tally->nroots; i++)
		if (question->weights[i] > SA_TALLY_ONE)
			return -ERANGE;
	part = &tally->parts[part_number];
	if (part->nrecords == 0 && part->nblocks == 0)
		return 0;
	bytes = malloc(BLOCK_RECORDS * sizeof(struct record));
	members = malloc(tally->nroots * sizeof *counting.members);
	if (!bytes || !members)
		return -ENOMEM;
	for (size_t i = 0; i < part->nblocks && !error; i++) {
		const size_t size = BLOCK_RECORDS * sizeof(struct record);

		error = read_all(tally->fd, bytes, size, part->blocks[i] * size);
		if (!error)
			error = take_records(&join, bytes, BLOCK_RECORDS);
	}
	if (!error)
		error = take_records(&join, part->block, part->nrecords);
	if (error)
		return error;
	merge_entries(&join);
	counting.nroots = tally->nroots;
	counting.members = members;
	for (size_t i = 0; i < join.n && !error;) {
		size_t end = i + 1;

		while (end < join.n && same_fp(&join.entries[i], &join.entries[end]))
			end++;
		error = count_page(&counting, &join.entries[i], end - i);
		i = end;
	}
	return error;
}
