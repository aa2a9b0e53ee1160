/*
 * api.h - every declaration of the native core, once.
 *
 * The C compiler and cffi read this same text, so it holds types, enumerators and prototypes only: no line may begin
 * with '#'. Include "sa.h" from C, which adds what a preprocessor needs around it.
 *
 * Conventions: a function that can fail returns 0 or -errno; results go to out parameters, last, named ret*. A pointer
 * that is not named ret* is read only and stays the caller's. "Packed" means an array without gaps in the byte order of
 * this machine (little-endian; checked at build time). A page is 4096 bytes. No function keeps a caller's pointer.
 * Nothing here prints, aborts or takes a lock; unless it says so, a function may run in any thread at any time, and one
 * object may be used by one thread at a time.
 */

enum {
	SA_PAGE_SIZE = 4096,
	SA_FP_SIZE = 32,            /* one fingerprint, one file root, one key */
	SA_SEGMENT_HEADER = 2097152 /* bytes before slot 0 of a segment */
};

/* ------------------------------------------------------------------------------------------------ hash.c */

/* What sa_hash_kernel_state says of a kernel. */
enum { SA_KERNEL_RUNS = 0, SA_KERNEL_NO_CPU = 1, SA_KERNEL_NOT_BUILT = 2 };

/* Kernels are numbered from 0; kernel 0 is "scalar" and defines the result of all others. Not built is not absent:
 * every name is listed in every build. */
int sa_hash_kernel_count(void);
const char *sa_hash_kernel_name(int kernel); /* static string, NULL out of range */
int sa_hash_kernel_state(int kernel);        /* SA_KERNEL_*, -EINVAL out of range */

/* Choose the kernel for all later calls of this process; "auto" is the fastest one that runs. -ENOENT: no such name;
 * -ENOTSUP: this CPU lacks it; -ENOSYS: not built. On error the choice stays what it was. Call before threads start. */
int sa_hash_select(const char *name);
const char *sa_hash_selected(void); /* static string: the name of the kernel in use, never "auto" */

/* Keyed BLAKE3-256 of each of npages pages that lie one after the other at pages. ret_fps: npages * 32 bytes.
 * ret_zero: npages bytes, 1 where all 4096 bytes are zero, else 0 (may be NULL). Both are written in the same pass. */
int sa_fingerprint_pages(const uint8_t *key, const uint8_t *pages, size_t npages, uint8_t *ret_fps, uint8_t *ret_zero);

/* File root: BLAKE3-256 in derive-key mode, context "sharearea 2026-11-20 file root v1", over the file's size (u64
 * little-endian) and then its npages fingerprints. Writes 32 bytes. */
int sa_file_root(uint64_t size, const uint8_t *fps, size_t npages, uint8_t *ret_root);

/* ------------------------------------------------------------------------------------------- pagecache.c */

/* State of a page after a read that is allowed to touch resident pages only. */
enum { SA_PAGE_ABSENT = 0, SA_PAGE_DATA = 1, SA_PAGE_ZERO = 2 };

/* How sa_resident_runs found out, and what to force in a test. */
enum { SA_RESIDENCY_AUTO = 0, SA_RESIDENCY_CACHESTAT = 1, SA_RESIDENCY_MINCORE = 2 };

/* Pages of [first, first + npages) of the regular file fd that are in the page cache, and those of them that are dirty
 * or under writeback, as the kernel counts them (cachestat(2), Linux 6.5). -ENOSYS on older kernels; -EOPNOTSUPP on
 * overlayfs, of whose files it sees nothing; -EPERM if the file is neither ours nor writable by us. npages 0: to the
 * end of the file. Causes no I/O. */
int sa_cachestat(int fd, uint64_t first, uint64_t npages, uint64_t *ret_cached, uint64_t *ret_dirty);

/* Resident pages of the first npages pages of fd, as ascending, disjoint, maximal runs: ret_runs gets pairs
 * (first, count), max_runs pairs at the most. how: SA_RESIDENCY_*; AUTO asks cachestat first, which settles files that
 * are wholly resident or wholly absent, and mincore(2) over a bounded window for the rest; with no cachestat, mincore
 * only. *ret_covered: pages looked at, fewer than npages when max_runs was reached. -EPERM: the kernel hides it from us
 * (mincore says 1 for all pages then; that is found out, not passed on). Causes no I/O. */
int sa_resident_runs(int fd, uint64_t npages, int how, uint32_t *ret_runs, size_t max_runs, size_t *ret_nruns,
                     uint64_t *ret_covered);

/* Fingerprint the resident pages among [first, first + npages) of fd, which the caller found resident. Copies them into
 * a bounded buffer without starting read-ahead (pagecache.c says how) and hashes each piece while it is in the
 * processor's cache; a page that is not there any more is ABSENT, costs no I/O and its 32 bytes are zeroed. The last,
 * short page of the file counts as zero-padded; size is the file's size as the caller knows it: a file that has a
 * different size now makes pages past its end ABSENT, and the short last page too, never a signal. ret_fps:
 * npages * 32 bytes, ret_state: npages bytes SA_PAGE_*. Where residency is hidden or a mapping refused,
 * preadv2(RWF_NOWAIT) or else pread(2) after the caller's own residency check. */
int sa_fingerprint_file(int fd, const uint8_t *key, uint64_t size, uint64_t first, uint64_t npages, uint8_t *ret_fps,
                        uint8_t *ret_state);

/* The same way of reading, into ret_pages (npages * 4096 bytes, zero-padded), with the fingerprints of exactly the
 * bytes that were returned. */
int sa_read_pages(int fd, const uint8_t *key, uint64_t size, uint64_t first, uint64_t npages, uint8_t *ret_pages,
                  uint8_t *ret_fps, uint8_t *ret_state);

/* Compare npages pages at mem with pages [first, first + npages) of fd (zero-padded at the end of the file), reading
 * the file through a bounded buffer; pages that are not resident are read from disk. *ret_equal: how many leading
 * pages are equal. */
int sa_compare_pages(int fd, uint64_t first, uint64_t npages, const uint8_t *mem, uint64_t *ret_equal);

/* Drop clean, unmapped pages [first, first + npages) of fd from the page cache (POSIX_FADV_DONTNEED; npages 0: to the
 * end). *ret_before, *ret_after: resident pages of the range as cachestat, or where it cannot tell mincore, counts them
 * just before and just after; both 0 with return -EPERM where neither tells (the pages are dropped all the same). */
int sa_drop_pages(int fd, uint64_t first, uint64_t npages, uint64_t *ret_before, uint64_t *ret_after);

/* ------------------------------------------------------------------------------------------------- map.c */

/* A segment of a sharing area on the local backend: a memfd of SA_SEGMENT_HEADER + nslots * 4096 bytes.
 * A created segment is writable through the mapping that its creator holds and by nobody else, ever: it is sealed
 * (FUTURE_WRITE, GROW, SHRINK, SEAL) before its descriptor leaves sa_segment_create. An adopted one is read only. */
typedef struct sa_segment sa_segment;

int sa_segment_create(const char *name, uint32_t nslots, sa_segment **ret);
/* Takes a duplicate of fd; refuses (-EPERM) a descriptor without those seals, (-EINVAL) one of another size. */
int sa_segment_adopt(int fd, uint32_t nslots, sa_segment **ret);
void sa_segment_destroy(sa_segment *segment); /* NULL is fine */
int sa_segment_fd(const sa_segment *segment); /* stays the segment's */
uint32_t sa_segment_nslots(const sa_segment *segment);
int sa_segment_writable(const sa_segment *segment);
/* st_dev and st_ino of the memfd: they name it for as long as the host runs. */
int sa_segment_identity(const sa_segment *segment, uint64_t *ret_dev, uint64_t *ret_ino);
int sa_segment_allocated(const sa_segment *segment, uint64_t *ret_bytes); /* memory the kernel holds for it */

/* Copy npages pages into slots [first, first + npages), then fingerprint the copies under key and compare them with
 * want (npages * 32 bytes): ret_ok gets npages bytes, 1 where equal. -ERANGE outside the segment, -EROFS if adopted. */
int sa_segment_fill(sa_segment *segment, const uint8_t *key, uint32_t first, uint32_t npages, const uint8_t *pages,
                    const uint8_t *want, uint8_t *ret_ok);
/* Fingerprint what is in the slots now and compare. */
int sa_segment_verify(const sa_segment *segment, const uint8_t *key, uint32_t first, uint32_t npages,
                      const uint8_t *want, uint8_t *ret_ok);
/* Copy npages pages out of the slots. */
int sa_segment_read(const sa_segment *segment, uint32_t first, uint32_t npages, uint8_t *ret_pages);

/* One stretch of a mapping: count pages of a file beginning at page, from slot on of some segment. */
struct sa_run {
	uint32_t page;
	uint32_t slot;
	uint32_t count;
};

/* Put slots of a segment (descriptor fd; slot numbers relative to the segment) under an existing mapping of a file:
 * for each run, pages [run.page, run.page + run.count) of the mapping at base, which is npages long, become read-only
 * shared pages of the segment. One mmap per run. A run outside the mapping: -ERANGE before anything was mapped.
 * *ret_mapped: runs done; on error the later ones are what they were. Never PROT_EXEC, never PROT_WRITE. Sets aside a
 * few mappings once per process, so that sa_map_file works when vm.max_map_count has been reached. */
int sa_map_runs(void *base, uint64_t npages, int fd, const struct sa_run *runs, size_t nruns, size_t *ret_mapped);

/* Put pages [first, first + npages) of file fd back at the same place of the mapping at base, read only and shared,
 * with no read-ahead if random is not 0. One mmap; atomic for every other thread. */
int sa_map_file(void *base, int fd, uint64_t first, uint64_t npages, int random);

/* Compare a mapping's runs with the file under them (sa_compare_pages for each run). *ret_equal_runs: leading runs that
 * are equal in all their pages. */
int sa_compare_runs(const void *base, uint64_t npages, int fd, const struct sa_run *runs, size_t nruns,
                    size_t *ret_equal_runs);

/* ----------------------------------------------------------------------------------------------- lease.c */

/* A signalfd that reports broken read leases. Blocks the lease signal (and SIGIO, which the kernel sends when its
 * queue is full) in the calling thread: call it before any other thread exists. */
int sa_lease_watch_open(int *ret_fd);
/* Take or give back a read lease on fd, which must be open read only. -EAGAIN: somebody has the file open for
 * writing. -EACCES: not the owner of the file and no CAP_LEASE. Giving back a lease that is gone is no error. */
int sa_lease_take(int fd);
int sa_lease_release(int fd);
/* 1 if nobody has the file open for writing at this instant, mapped writable included, by taking a read lease and giving
 * it back; 0 if somebody has, or no lease may be taken. fd as for sa_lease_take, without a lease. */
int sa_file_is_quiet(int fd, int *ret_quiet);
/* 1 while the lease is whole, 0 when it is being broken or gone. */
int sa_lease_held(int fd, int *ret_held);
/* Read what has been reported: descriptors whose lease is being broken, max at the most, without blocking; *ret_n 0
 * when there is nothing. *ret_overflow 1: reports were lost, ask sa_lease_held for every lease. */
int sa_lease_watch_read(int watch_fd, int *ret_fds, size_t max, size_t *ret_n, int *ret_overflow);

/* ----------------------------------------------------------------------------------------------- mount.c */

/* The number of the mount that a file is on, which is never used again; 0 where the kernel has none (before Linux 6.8).
 * A mount namespace that is made of another has mounts of its own. */
int sa_mount_id(int fd, uint64_t *ret);

/* ----------------------------------------------------------------------------------------------- table.c */

/* The fingerprint table of one pool: which pages are known, who holds them, which slot has them, who maps the slot.
 * Pages have dense ids (uint32, recycled); id 0 is the zero page. sharearea/pagetable.py has the slow twin that defines
 * every function below. All arrays are packed; ids and slots are uint32; the slot 0xffffffff means no slot. */
typedef struct sa_table sa_table;

/* seed: 40 random bytes (peers choose fingerprints; the seed keeps them from choosing collisions). zero_fp: the
 * fingerprint of the zero page. Holders are numbered [0, max_holders); at most max_pages pages. */
int sa_table_create(const uint8_t *seed, const uint8_t *zero_fp, uint32_t max_holders, uint32_t max_pages,
                    sa_table **ret);
void sa_table_destroy(sa_table *table);

/* Find or add n fingerprints, one reference to each occurrence. -ENOSPC: max_pages, or 2^30 - 1 references of one page,
 * would be passed; nothing is changed then. */
int sa_table_intern(sa_table *table, const uint8_t *fps, size_t n, uint32_t *ret_ids);
/* Give back one reference per occurrence. A page without references forgets its holders and leaves its slot; without
 * a pending publication its id is recycled. ret_freed (n entries): slots that nobody maps and no page uses now. */
int sa_table_unref(sa_table *table, const uint32_t *ids, size_t n, uint32_t *ret_freed, size_t *ret_nfreed);

/* Set, clear one holder on n pages; clear one holder everywhere. */
int sa_table_mark(sa_table *table, const uint32_t *ids, size_t n, uint32_t holder);
int sa_table_unmark(sa_table *table, const uint32_t *ids, size_t n, uint32_t holder);
int sa_table_forget(sa_table *table, uint32_t holder);

/* Positions (0..n-1, ascending) in ids of pages that have no slot, are not pending, are not the zero page and have at
 * least k holders; each page once. They are pending from now on. ret_positions: n entries. */
int sa_table_want(sa_table *table, const uint32_t *ids, size_t n, uint32_t k, uint32_t *ret_positions, size_t *ret_n);
/* Not pending any more (and not published). Recycles ids that lost their last reference meanwhile. */
int sa_table_unwant(sa_table *table, const uint32_t *ids, size_t n);
/* Page ids[i] is in slots[i] now and not pending; a slot it had before is left (a move), and listed in ret_freed
 * (n entries) if nobody maps it. A page that lost its last reference while pending gets no slot: slots[i] is listed in
 * ret_freed instead. -EEXIST: a slot is used by a page or mapped, or given twice; nothing is changed then. */
int sa_table_publish(sa_table *table, const uint32_t *ids, const uint32_t *slots, size_t n, uint32_t *ret_freed,
                     size_t *ret_nfreed);

int sa_table_fps(const sa_table *table, const uint32_t *ids, size_t n, uint8_t *ret_fps);
/* Slot of each page, 0xffffffff where there is none. */
int sa_table_slots(const sa_table *table, const uint32_t *ids, size_t n, uint32_t *ret_slots);
/* How many of the n are: zero pages; in a slot; occurrences beyond the first of the same page (zero pages left out). */
int sa_table_count(sa_table *table, const uint32_t *ids, size_t n, uint64_t *ret_zero, uint64_t *ret_in_slot,
                   uint64_t *ret_repeated);
/* Runs (page, slot, count) over the pages that are in slots: pages[i] is the page number of ids[i] in its file (NULL:
 * i). Neither pages nor slots jump inside a run, and no run crosses a multiple of slots_per_segment. ret_runs: n
 * entries of three uint32. */
int sa_table_runs(const sa_table *table, const uint32_t *ids, const uint32_t *pages, size_t n,
                  uint32_t slots_per_segment, uint32_t *ret_runs, size_t *ret_nruns);

/* One more, one fewer mapping of every slot in the runs (the second field of each triple is the slot). -ERANGE: a slot
 * was never used; -EINVAL on unmap: a slot has no mapping; nothing is changed then. ret_freed: room for all slots. */
int sa_table_map(sa_table *table, const uint32_t *runs, size_t nruns);
int sa_table_unmap(sa_table *table, const uint32_t *runs, size_t nruns, uint32_t *ret_freed, size_t *ret_nfreed);

/* What a page costs when nobody else maps its slot, in the unit of sa_table_share. */
enum { SA_SHARE_PAGE = 16777216 };

/* The part that mappings of the slots in the runs pay: SA_SHARE_PAGE / mappings for each slot, rounded down, added up
 * (a page in 4096 loses less than a byte to rounding). Over all runs that are mapped, a slot is paid once. -ERANGE: a
 * slot was never used; -EINVAL: a slot has no mapping. */
int sa_table_share(const sa_table *table, const uint32_t *runs, size_t nruns, uint64_t *ret_share);

/* Slots [first, first + n) that pages use: ret_slots, ret_ids (n entries each). *ret_mapped: mappings of slots in the
 * range, used by a page or not. */
int sa_table_live(const sa_table *table, uint32_t first, size_t n, uint32_t *ret_slots, uint32_t *ret_ids,
                  size_t *ret_n, uint64_t *ret_mapped);

struct sa_table_totals {
	uint64_t pages;          /* distinct pages known, the zero page left out */
	uint64_t slots_used;     /* slots that a page uses */
	uint64_t slots_mapped;   /* distinct slots with at least one mapping */
	uint64_t mappings;       /* sum of mappings over all slots */
	uint64_t pending;        /* pages wanted and not yet published */
	uint64_t memory_bytes;   /* memory of the table itself */
	uint64_t by_holders[8];  /* slots used, by holders of their page: 0, 1, 2, 3, 4-7, 8-15, 16-31, 32 and more */
	uint64_t by_mappings[7]; /* slots mapped, by mappings: 1, 2, 3, 4-7, 8-15, 16-31, 32 and more */
};
int sa_table_totals(const sa_table *table, struct sa_table_totals *ret);

/* Counts over pages with references, their ids in [first, first + n), the zero page left out. ret_held, ret_common,
 * ret_share: one entry for each holder: pages that it holds; of these, pages that k holders or more have; its parts of
 * those, SA_SHARE_PAGE / holders each, rounded down, added up. */
struct sa_table_census {
	uint64_t common; /* pages that k holders or more have */
	uint64_t copies; /* their holders, added up */
	uint64_t end;    /* no page has an id from here on */
};
int sa_table_census(const sa_table *table, uint32_t first, size_t n, uint32_t k, uint64_t *ret_held,
                    uint64_t *ret_common, uint64_t *ret_share, struct sa_table_census *ret);

/* -------------------------------------------------------------------------------------------- estimate.c */

/* The tally of an estimate: pages of files of several roots, counted by fingerprint. What is fed is hashed at once;
 * memory stays bounded, as records go to a file of the caller's. Roots and files have numbers of the caller's, [0,
 * nroots) and [0, nfiles). */
typedef struct sa_tally sa_tally;

/* What a page is when its file is run or loaded, by the file's ELF program headers: in an executable segment, in one
 * that is only read, anything else. Of two, the stronger: TEXT, RODATA, DATA. */
enum { SA_CLASS_DATA = 0, SA_CLASS_RODATA = 1, SA_CLASS_TEXT = 2, SA_CLASSES = 3 };

enum {
	SA_TALLY_PARTS = 256,  /* each holds the pages of some fingerprints, whatever their root */
	SA_TALLY_ONE = 1048576 /* the weight of a page that is always there; sums are in this unit */
};

/* fd: an empty file, open for reading and writing, which is duplicated; it grows by 24 bytes for each page that is not
 * zero, and not at all as long as few pages are fed. nroots: 1 to 65535. */
int sa_tally_create(int fd, const uint8_t *key, uint32_t nroots, sa_tally **ret);
void sa_tally_destroy(sa_tally *tally); /* NULL is fine */

/* One file after the other: begin, any number of feeds and holes in the file's order, end. Program headers are looked
 * for in the first feed, if no hole came before it. A last, short page is padded with zeros. abandon in place of end
 * drops the short page; whole pages that were fed stay counted. After another error than -EINVAL, or one of reading in
 * feed_fd, the tally is of no use any more; -ENOSPC: the caller's file cannot be written. */
int sa_tally_begin(sa_tally *tally, uint32_t root, uint32_t file);
int sa_tally_feed(sa_tally *tally, const uint8_t *data, size_t size);
int sa_tally_hole(sa_tally *tally, uint64_t size); /* zero bytes that nobody has to read */
/* size bytes of a file or device fd from offset on; sparse not 0: its holes are not read. *ret_fed: how many there were,
 * fewer where fd ends early; on an error too. -EIO, -EISDIR and the like: fd cannot be read. */
int sa_tally_feed_fd(sa_tally *tally, int fd, uint64_t offset, uint64_t size, int sparse, uint64_t *ret_fed);
int sa_tally_end(sa_tally *tally);
int sa_tally_abandon(sa_tally *tally);
/* All of it at once, for a whole file; an error of reading abandons it. */
int sa_tally_file(sa_tally *tally, uint32_t root, uint32_t file, int fd, uint64_t size, int sparse, uint64_t *ret_fed);

struct sa_tally_root {
	uint64_t files;
	uint64_t pages;       /* all of them, of which */
	uint64_t zero;        /* are zero, and */
	uint64_t by_class[3]; /* SA_CLASS_*: are not */
};
int sa_tally_root(const sa_tally *tally, uint32_t root, struct sa_tally_root *ret);
int sa_tally_spilled(const sa_tally *tally, uint64_t *ret_bytes); /* what the caller's file holds now */

/* What sa_tally_join is asked. A page is held by a root if it has the page at all; with weights below SA_TALLY_ONE, it
 * is there only for that part of the time, and then whenever it is in a root of smaller weight. */
struct sa_tally_question {
	const uint32_t *groups; /* nfiles numbers below ngroups: where the gain of a file's pages is added */
	size_t nfiles;
	uint32_t ngroups;
	const uint32_t *weights; /* nroots numbers, SA_TALLY_ONE at the most */
	int without_text;        /* not 0: pages of class TEXT are not shared */
};

/* Zero pages are in none of these. All but distinct are in units of SA_TALLY_ONE to a page. */
struct sa_tally_sums {
	uint64_t distinct; /* different pages in all roots together */
	uint64_t saved
		[3];   /* SA_CLASS_*: copies beyond the first, one per root; TEXT: what without_text would leave out */
	uint64_t area; /* pages that several roots hold */
	uint64_t repeated; /* of those: what single roots have of them more than once */
};
/* Count one part, and add it to what the caller has: *ret_sums; ret_repeated (nroots): occurrences beyond the first in
 * the same root, in pages; ret_pairs (nroots * nroots, row < column): what two roots would save if there were no others;
 * ret_groups (ngroups): what is saved, by the first file (smallest number) that has the page. -ERANGE: a file or group
 * beyond the question's, or a weight; the sums are of no use then. */
int sa_tally_join(const sa_tally *tally, uint32_t part, const struct sa_tally_question *question,
                  struct sa_tally_sums *ret_sums, uint64_t *ret_repeated, uint64_t *ret_pairs, uint64_t *ret_groups);

/* ---------------------------------------------------------------------------------------------- gntdev.c */

/* Pages that another domain has granted to this guest, under a mapping of a file (the `xen` backend, guest side).
 * Needs /dev/xen/gntdev. Never PROT_WRITE, never PROT_EXEC. */
typedef struct sa_grants sa_grants;

enum { SA_GRANTS_AT_ONCE = 65536 }; /* references in one ioctl: the kernel's limit */

/* Open the grant device read only, so that nothing mapped through the descriptor can become writable in whatever
 * process. *ret_noexec: 1 if nothing can become executable either (executing a granted page kills a PVH guest): that
 * takes CAP_SYS_ADMIN and Linux 5.12, or a noexec mount under path. The descriptor is the caller's. */
int sa_grants_open(const char *path, int *ret_fd, int *ret_noexec);

/* Join runs whose pages follow one another, whatever their slots. ret_stretches (nruns entries): page, number of its
 * first page among all pages of the runs, count. -EINVAL: a run without pages; -ERANGE: a number would overflow. */
int sa_join_runs(const struct sa_run *runs, size_t nruns, struct sa_run *ret_stretches, size_t *ret_n);

/* Map the grants of a file beside it, to be compared: runs (page of the file, first grant reference, count) of domain
 * domid, through the descriptor device. One ioctl and one mmap for each stretch of pages that follow one another,
 * SA_GRANTS_AT_ONCE pages at the most (half of that if not movable). movable: mappings of grants may be moved in this
 * guest (PVH and HVM: yes; PV: no). A reference that is not ours, or no room in the hypervisor: -EINVAL. */
int sa_grants_create(int device, uint32_t domid, const struct sa_run *runs, size_t nruns, int movable, sa_grants **ret);
/* Unmaps what was not put in place. The caller closes device, after which a grant is let go with its last mapping. */
void sa_grants_destroy(sa_grants *grants); /* NULL is fine */
/* Mappings that they take in place. */
size_t sa_grants_stretches(const sa_grants *grants);
/* *ret_equal 1: every page is equal to its page of the file. -EINVAL after sa_grants_place. */
int sa_grants_compare(const sa_grants *grants, int file, int *ret_equal);
/* Put them under an existing mapping of the file, npages long; the way back is sa_map_file. Atomic for other threads,
 * stretch by stretch. *ret_placed: stretches done; where one fails the file's pages are there, and later ones are what
 * they were. Once only. A child of fork has holes where they are. */
int sa_grants_place(sa_grants *grants, int device, void *base, uint64_t npages, int file, size_t *ret_placed);

/* Map ioctls and mmaps of this process since its start, and the pages that they mapped. */
void sa_grants_calls(uint64_t *ret_ioctls, uint64_t *ret_mmaps, uint64_t *ret_pages);

/* ------------------------------------------------------------------------------------------------ ring.c */

/* One side of two byte rings (one each way) in memory that a peer can write too, at any time and anything: the layout of
 * libxenvchan (xen/include/public/io/libxenvchan.h). "left" carries bytes from client to server, "right" the other way.
 * A ring holds 2^order bytes: order 10 lies in the control page at byte 1024, order 11 at byte 2048, so one ring of each
 * pair at the most has each of these; orders 12 to 20 have pages of their own. For one thread at a time. */
typedef struct sa_ring sa_ring;

enum { SA_RING_SERVER = 0, SA_RING_CLIENT = 1 };
enum { SA_RING_MIN_ORDER = 10, SA_RING_MAX_ORDER = 20 };
/* WAITING: a server's client has not come yet. CLOSED is for ever: the peer has left, or says what makes no sense. */
enum { SA_RING_WAITING = 0, SA_RING_OPEN = 1, SA_RING_CLOSED = 2 };

/* Pages that a pair needs besides its control page, 0 for a ring inside it. -EINVAL: no such pair of orders. */
int sa_ring_pages(uint32_t left_order, uint32_t right_order, uint32_t *ret_left, uint32_t *ret_right);
/* Write a control page that waits for its first client. ret_control: 4096 bytes, aligned to 4. grants: references of the
 * left ring's pages, then of the right ring's (NULL: all zero). */
int sa_ring_format(uint8_t *ret_control, uint32_t left_order, uint32_t right_order, const uint32_t *grants);
/* Take a side of a formatted pair. The ring keeps the three pointers, which must stay valid until it is destroyed: to
 * the control page and to each ring's own pages (NULL: inside the control page). Writes nothing. */
int sa_ring_create(int side, uint8_t *control, uint8_t *left, uint8_t *right, uint32_t left_order, uint32_t right_order,
                   sa_ring **ret);
void sa_ring_destroy(sa_ring *ring); /* NULL is fine. Says nothing to the peer. */
/* Client: tell the server, through the control page, that it is here. An event has to follow. */
void sa_ring_connect(sa_ring *ring);
/* Tell the peer, through the control page, that this side has left. An event has to follow. */
void sa_ring_hang_up(sa_ring *ring);
int sa_ring_state(sa_ring *ring); /* SA_RING_* */
/* Move bytes: as many as there are or fit, max at the most. Whoever gets or puts fewer than max has asked the peer for
 * an event when there is more. *ret_notify 1: the peer asked for one; send it. -EPROTO: the peer's counters make no
 * sense; nothing was moved. */
int sa_ring_read(sa_ring *ring, uint8_t *ret_bytes, size_t max, size_t *ret_n, int *ret_notify);
int sa_ring_write(sa_ring *ring, const uint8_t *bytes, size_t max, size_t *ret_n, int *ret_notify);

/* ----------------------------------------------------------------------------------------------- vchan.c */

/* A pair of rings between two Xen domains, with an event channel: what libxenvchan makes, through the devices under
 * /dev/xen. The control page says that an end has left also when its process was killed. -ENOENT, -ENXIO or -ENODEV: a
 * device is missing. */
typedef struct sa_vchan sa_vchan;

/* Server: allocate pages, granted to domain domid, and an event channel for it. -ENOSPC: the limit of xen-gntalloc. */
int sa_vchan_serve(uint32_t domid, uint32_t read_order, uint32_t write_order, sa_vchan **ret);
/* Client: connect to a server of domain domid. -EBUSY: its ring is not fresh (somebody was connected, or the server has
 * left); -EPROTO: its control page makes no sense; -EINVAL: no such grant or port for us. Only a call that succeeds
 * changes anything that the server sees. */
int sa_vchan_connect(uint32_t domid, uint32_t ring_ref, uint32_t port, sa_vchan **ret);
/* Tell the peer, and let everything go. NULL is fine. */
void sa_vchan_destroy(sa_vchan *vchan);
int sa_vchan_fd(const sa_vchan *vchan);            /* readable when an event is pending; stays the vchan's */
uint32_t sa_vchan_ring_ref(const sa_vchan *vchan); /* of the control page */
uint32_t sa_vchan_port(const sa_vchan *vchan);     /* in this domain */
/* Take the pending event, if there is one, and let the next one come. Never waits. */
int sa_vchan_drain(sa_vchan *vchan, int *ret_pending);
int sa_vchan_state(sa_vchan *vchan); /* SA_RING_* */
/* sa_ring_read, sa_ring_write, and the event that the peer asked for. */
int sa_vchan_read(sa_vchan *vchan, uint8_t *ret_bytes, size_t max, size_t *ret_n);
int sa_vchan_write(sa_vchan *vchan, const uint8_t *bytes, size_t max, size_t *ret_n);

/* ------------------------------------------------------------------------------------------ grant_xen.c */

/* The dom0 half of grants, and the area domain's memory. A table of grant entries is given as chunks of
 * SA_GRANT_CHUNK entries each (the last one may be shorter), nentries in all; entry 0 to SA_GRANT_FIRST - 1 are Xen's
 * and the toolstack's own and are never touched. Entries have version 1: {u16 flags, u16 domid, u32 frame}. These three
 * are pure: they run over any memory, one caller at a time, beside Xen, which sets and clears "in use" bits at any
 * moment. */
enum { SA_GRANT_FIRST = 8, SA_GRANT_CHUNK = 16384 };

/* Let domain domid map frame frames[i] read only by reference refs[i]. -EINVAL: a reference below SA_GRANT_FIRST, twice
 * in refs, or a domid that Xen reserves; -ERANGE: not in the table; -EBUSY: an entry that is not free. Nothing is
 * written then. */
int sa_grants_write(void *const *chunks, size_t nentries, uint32_t domid, const uint32_t *frames, const uint32_t *refs,
                    size_t n);
/* Take back: ret_busy gets n bytes, 0 where the entry is free now (or was), 1 where Xen has it in use, or a guest takes
 * and drops it so fast that it cannot be told: it stays as it is. -EINVAL, -ERANGE as above; nothing is revoked then. */
int sa_grants_revoke(void *const *chunks, size_t nentries, const uint32_t *refs, size_t n, uint8_t *ret_busy);
/* All entries from SA_GRANT_FIRST on that are not free, ascending: the first max of them, *ret_n how many there are. */
int sa_grants_list(void *const *chunks, size_t nentries, size_t max, uint32_t *ret_refs, uint32_t *ret_domids,
                   uint32_t *ret_frames, size_t *ret_n);

/* Memory and grant table of an area domain, which never runs, from dom0. Slot s of it is guest frame base + s. As long
 * as this is open the domid names this very domain: the table is mapped, so Xen keeps at least the husk of it. */
typedef struct sa_area sa_area;

/* base: a multiple of 512. Loads libxenforeignmemory.so.1 and libxencall.so.1 (-ELIBACC: they are not there). -ESRCH: no
 * such domain. */
int sa_area_open(uint32_t domid, uint64_t base, sa_area **ret);
void sa_area_close(sa_area *area);                                         /* NULL is fine */
int sa_area_alive(sa_area *area, int *ret_alive);                          /* 0: destroyed, or being so */
int sa_area_memory(sa_area *area, uint64_t *ret_pages);                    /* all that the domain has, its stub's too */
int sa_area_table(sa_area *area, uint32_t *ret_frames, uint32_t *ret_max); /* grant frames now, and at the most */

/* Slots from *ret_end on never had a frame (2 MiB steps). -EOVERFLOW: the area is beyond what Xen's answer can say. */
int sa_area_end(sa_area *area, uint32_t *ret_end);
/* One byte for each 2 MiB of slots, from slot 0 on: 1 where its last slot has a frame. That one comes first and goes
 * last: where it is 0 there is none in these 2 MiB, whenever a broker died. */
int sa_area_blocks(sa_area *area, uint32_t nblocks, uint8_t *ret_there);
/* One byte per slot of [first, first + n): 1 where there is a frame. */
int sa_area_present(sa_area *area, uint32_t first, uint32_t n, uint8_t *ret_present);
/* Get frames for the slots, ascending in machine memory, 2 MiB at a time where Xen has that, else 4 KiB. Frames that an
 * earlier broker left there go first. -EDQUOT: the domain may not have so many pages; -ENOMEM: Xen has no more. Nothing
 * was populated then. */
int sa_area_populate(sa_area *area, uint32_t first, uint32_t n);
/* Give frames back; a slot without one is fine. One that a guest maps is freed when it lets go. */
int sa_area_release(sa_area *area, uint32_t first, uint32_t n);

/* As sa_segment_fill, _verify, _read. fill maps the target frames writable for the time of the call. A slot without a
 * frame is -ENXIO, but verify calls it unequal. read takes any slots. */
int sa_area_fill(sa_area *area, const uint8_t *key, uint32_t first, uint32_t npages, const uint8_t *pages,
                 const uint8_t *want, uint8_t *ret_ok);
int sa_area_verify(sa_area *area, const uint8_t *key, uint32_t first, uint32_t npages, const uint8_t *want,
                   uint8_t *ret_ok);
int sa_area_read(sa_area *area, const uint32_t *slots, size_t n, uint8_t *ret_pages);

/* sa_grants_* over the domain's own table, with slots for frames. The table grows as needed; -ENOSPC: it may not.
 * A frame that is no slot is listed as slot 0xffffffff. A reference beyond the table's present end is free. */
int sa_area_grant(sa_area *area, uint32_t domid, const uint32_t *slots, const uint32_t *refs, size_t n);
int sa_area_revoke(sa_area *area, const uint32_t *refs, size_t n, uint8_t *ret_busy);
int sa_area_entries(sa_area *area, size_t max, uint32_t *ret_refs, uint32_t *ret_domids, uint32_t *ret_slots,
                    size_t *ret_n);
/* How many entries from SA_GRANT_FIRST on are not free, and how many of them guests have mapped at this moment. */
int sa_area_usage(sa_area *area, size_t *ret_granted, size_t *ret_in_use);
