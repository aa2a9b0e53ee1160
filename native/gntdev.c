/*
 * gntdev.c - the guest's half of grants: pages that another domain lends us, under a mapping of a file.
 *
 * Raw ioctls of the kernel's grant device; no Xen library. Which reference belongs to which page is the broker's and the
 * agent's; the other half, which writes the entries, is grant_xen.c. The rules this file goes by, each seen on Linux 6.1
 * under Xen 4.17 (tests/xen/guest_probe.py shows them again):
 *
 * - An index (one MAP_GRANT_REF ioctl) is mapped once and whole; any other mmap of it is EINVAL, also after munmap.
 * - A grant is let go with its last mapping, once the descriptor that it came through is closed. On PV a part is let go
 *   as soon as it is unmapped, on PVH and HVM the whole index with its last page.
 * - mmap takes what lies at a MAP_FIXED address away before the hypervisor is asked. If that says no, a hole is left, and
 *   other threads fault on it or get it from their next mmap. So nothing is put over a file's pages that was not mapped
 *   and compared elsewhere first:
 *   - PVH, HVM ("movable"): that very mapping is moved into place. mremap cannot be refused by the hypervisor.
 *   - PV: a moved mapping is SIGBUS. There the grants are mapped a second time, into place, while the first mapping
 *     keeps the broker from giving the references to other pages. The first one holds each reference twice, and one
 *     half is given up just before: so the hypervisor has room for the second (its maptrack is the limit one can meet).
 * - A child gets none of it (PV by nature, here everywhere): it would hold grants that nobody asks it to let go.
 */
#include "gntdev_abi.h"
#include "sa.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ------------------------------------------------------------------------------------------------- the kernel's side */

/* Linux UAPI, include/uapi/linux/mount.h: since 5.2 and 5.12. glibc 2.36 has it, older ones do not. */
#define SA_OPEN_TREE_CLONE 1U
#define SA_OPEN_TREE_CLOEXEC ((unsigned)O_CLOEXEC)
#define SA_MOUNT_ATTR_RDONLY 0x01U
#define SA_MOUNT_ATTR_NOSUID 0x02U
#define SA_MOUNT_ATTR_NOEXEC 0x08U
#ifndef SYS_open_tree
#define SYS_open_tree 428
#endif
#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif

struct mount_attributes {
	uint64_t set;
	uint64_t clear;
	uint64_t propagation;
	uint64_t userns;
};

static atomic_uint_least64_t map_ioctls;
static atomic_uint_least64_t map_mmaps;
static atomic_uint_least64_t map_pages;

void sa_grants_calls(uint64_t *ret_ioctls, uint64_t *ret_mmaps, uint64_t *ret_pages)
{
	*ret_ioctls = atomic_load(&map_ioctls);
	*ret_mmaps = atomic_load(&map_mmaps);
	*ret_pages = atomic_load(&map_pages);
}

/* Reopening a descriptor goes through the mount that it was opened through, and whether a mapping may become executable
 * is asked of that mount (mm/mmap.c, path_noexec). A mount of the one file, seen by nobody, noexec, is enough. */
static int open_noexec(const char *path, int *ret_fd)
{
	const struct mount_attributes attributes = {
		.set = SA_MOUNT_ATTR_RDONLY | SA_MOUNT_ATTR_NOSUID | SA_MOUNT_ATTR_NOEXEC,
	};
	const int tree = (int)syscall(SYS_open_tree, AT_FDCWD, path, SA_OPEN_TREE_CLONE | SA_OPEN_TREE_CLOEXEC);
	char again[sizeof "/proc/self/fd/" + 11];
	int error = 0;

	if (tree < 0)
		return -errno;
	(void)snprintf(again, sizeof again, "/proc/self/fd/%d", tree);
	if (syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attributes, sizeof attributes) < 0)
		error = -errno;
	if (!error) {
		*ret_fd = open(again, O_RDONLY | O_CLOEXEC);
		if (*ret_fd < 0)
			error = -errno;
	}
	/* A read-only descriptor: Linux closes it whatever close(2) returns. */
	(void)close(tree);
	return error;
}

int sa_grants_open(const char *path, int *ret_fd, int *ret_noexec)
{
	struct statvfs mount;

	*ret_fd = -1;
	*ret_noexec = 0;
	/* Without the right to make a mount, the mount that the device is on may be noexec all the same. */
	if (open_noexec(path, ret_fd) != 0)
		*ret_fd = open(path, O_RDONLY | O_CLOEXEC);
	if (*ret_fd < 0)
		return -errno;
	*ret_noexec = fstatvfs(*ret_fd, &mount) == 0 && (mount.f_flag & ST_NOEXEC) != 0;
	return 0;
}

/* ------------------------------------------------------------------------------------------------------- stretches */

int sa_join_runs(const struct sa_run *runs, size_t nruns, struct sa_run *ret_stretches, size_t *ret_n)
{
	uint32_t total = 0;

	*ret_n = 0;
	for (size_t i = 0; i < nruns; i++) {
		const struct sa_run run = runs[i];
		struct sa_run *last = *ret_n ? &ret_stretches[*ret_n - 1] : NULL;

		if (run.count == 0)
			return -EINVAL;
		if (run.count - 1 > UINT32_MAX - run.page || run.count > UINT32_MAX - total)
			return -ERANGE;
		if (last && (uint64_t)last->page + last->count == run.page)
			last->count += run.count;
		else
			ret_stretches[(*ret_n)++] =
				(struct sa_run){.page = run.page, .slot = total, .count = run.count};
		total += run.count;
	}
	return 0;
}

/* Where in a list of runs one is: page `taken` of run `at`. */
struct walk {
	const struct sa_run *runs;
	size_t nruns;
	size_t at;
	uint32_t taken;
};

/* Take pages that follow one another, most at the most, and write their references to ret_refs. */
static uint32_t walk_stretch(struct walk *walk, uint32_t domid, uint32_t most, struct gntdev_ref *ret_refs,
                             uint32_t *ret_page)
{
	uint32_t n = 0;

	*ret_page = walk->runs[walk->at].page + walk->taken;
	while (walk->at < walk->nruns && n < most) {
		const struct sa_run run = walk->runs[walk->at];
		const uint32_t left = run.count - walk->taken;
		const uint32_t take = left < most - n ? left : most - n;

		if ((uint64_t)run.page + walk->taken != (uint64_t)*ret_page + n)
			break;
		for (uint32_t i = 0; i < take; i++, n++)
			ret_refs[n] = (struct gntdev_ref){.domid = domid, .ref = run.slot + walk->taken + i};
		walk->taken += take;
		if (walk->taken == run.count) {
			walk->at++;
			walk->taken = 0;
		}
	}
	return n;
}

/* ---------------------------------------------------------------------------------------------------------- grants */

struct stretch {
	uint32_t page;
	uint32_t count;
	uint8_t *beside; /* the mapping that is compared; NULL: in place, or none */
	size_t bytes;    /* of that mapping */
};

struct sa_grants {
	pid_t owner;
	uint32_t domid;
	bool movable;
	size_t nruns;
	size_t nstretches;
	size_t room;
	struct stretch *stretches;
	struct gntdev_map *map; /* room for one ioctl */
	struct sa_run runs[];
};

static size_t pages_bytes(uint64_t npages)
{
	return (size_t)npages * SA_PAGE_SIZE;
}

static int check_references(const struct sa_run *runs, size_t nruns, uint64_t *ret_total, uint32_t *ret_longest)
{
	uint64_t total = 0;
	uint64_t stretch = 0;
	uint64_t longest = 0;

	for (size_t i = 0; i < nruns; i++) {
		if (runs[i].count == 0)
			return -EINVAL;
		if (runs[i].count - 1 > UINT32_MAX - runs[i].page || runs[i].count - 1 > UINT32_MAX - runs[i].slot)
			return -ERANGE;
		total += runs[i].count;
		stretch = i && (uint64_t)runs[i - 1].page + runs[i - 1].count == runs[i].page ? stretch : 0;
		stretch += runs[i].count;
		longest = stretch > longest ? stretch : longest;
	}
	*ret_total = total;
	*ret_longest = longest < SA_GRANTS_AT_ONCE ? (uint32_t)longest : SA_GRANTS_AT_ONCE;
	return 0;
}

static int grants_new(uint32_t domid, const struct sa_run *runs, size_t nruns, bool movable, sa_grants **ret)
{
	uint64_t total;
	uint32_t longest;
	const int error = check_references(runs, nruns, &total, &longest);
	sa_grants *grants;

	if (error)
		return error;
	/* On PV a reference stands twice in an ioctl, so no more than half of the pages of an ioctl are a stretch. */
	const uint64_t most = movable ? SA_GRANTS_AT_ONCE : SA_GRANTS_AT_ONCE / 2;
	const uint64_t refs = movable ? longest : 2 * (longest < most ? longest : most);
	const uint64_t room = nruns + total / most + 1;

	if (nruns > (SIZE_MAX - sizeof *grants) / sizeof *runs || room > SIZE_MAX / sizeof *grants->stretches)
		return -ENOMEM;
	grants = malloc(sizeof *grants + nruns * sizeof *runs);
	if (grants == NULL)
		return -ENOMEM;
	*grants = (sa_grants){
		.owner = getpid(), .domid = domid, .movable = movable, .nruns = nruns, .room = (size_t)room};
	if (nruns)
		memcpy(grants->runs, runs, nruns * sizeof *runs);
	grants->stretches = calloc((size_t)room, sizeof *grants->stretches);
	grants->map = malloc(sizeof *grants->map + (size_t)refs * sizeof grants->map->refs[0]);
	if (grants->stretches == NULL || grants->map == NULL) {
		sa_grants_destroy(grants);
		return -ENOMEM;
	}
	*ret = grants;
	return 0;
}

/* The references that stand in grants->map, mapped at `at` (NULL: anywhere). */
static int map_references(const sa_grants *grants, int device, uint32_t count, void *at, uint8_t **ret)
{
	struct gntdev_map *map = grants->map;
	void *mapped;

	map->count = count;
	map->pad = 0;
	map->index = 0;
	atomic_fetch_add(&map_ioctls, 1);
	if (ioctl(device, GNTDEV_MAP, map) < 0)
		return -errno;
	atomic_fetch_add(&map_mmaps, 1);
	mapped = mmap(at, pages_bytes(count), PROT_READ, MAP_SHARED | (at ? MAP_FIXED : 0), device, (off_t)map->index);
	if (mapped == MAP_FAILED) {
		const int error = -errno;
		const struct gntdev_unmap unmap = {.index = map->index, .count = count};

		/* It would go with the descriptor; until then it takes kernel memory. */
		(void)ioctl(device, GNTDEV_UNMAP, &unmap);
		return error;
	}
	atomic_fetch_add(&map_pages, count);
	*ret = mapped;
	/* Cannot split anything: it is the whole of a mapping. */
	if (madvise(mapped, pages_bytes(count), MADV_DONTFORK) < 0)
		return -errno;
	return 0;
}

static int map_beside(sa_grants *grants, int device, struct walk *walk)
{
	struct stretch *stretch = &grants->stretches[grants->nstretches];
	struct gntdev_ref *refs = grants->map->refs;
	const uint32_t most = grants->movable ? SA_GRANTS_AT_ONCE : SA_GRANTS_AT_ONCE / 2;
	uint32_t count = walk_stretch(walk, grants->domid, most, refs, &stretch->page);

	stretch->count = count;
	grants->nstretches++;
	if (!grants->movable) {
		memcpy(refs + count, refs, count * sizeof *refs);
		count *= 2;
	}
	stretch->bytes = pages_bytes(count);
	return map_references(grants, device, count, NULL, &stretch->beside);
}

int sa_grants_create(int device, uint32_t domid, const struct sa_run *runs, size_t nruns, int movable, sa_grants **ret)
{
	struct walk walk = {.nruns = nruns};
	sa_grants *grants;
	int error;

	*ret = NULL;
	error = grants_new(domid, runs, nruns, movable != 0, &grants);
	if (error)
		return error;
	walk.runs = grants->runs;
	while (!error && walk.at < walk.nruns)
		error = map_beside(grants, device, &walk);
	if (error) {
		sa_grants_destroy(grants);
		return error;
	}
	*ret = grants;
	return 0;
}

void sa_grants_destroy(sa_grants *grants)
{
	if (grants == NULL)
		return;
	for (size_t i = 0; i < grants->nstretches; i++) {
		/* Whole mappings of our own; in a child something else may be there. */
		if (grants->stretches[i].beside && grants->owner == getpid())
			(void)munmap(grants->stretches[i].beside, grants->stretches[i].bytes);
	}
	free(grants->stretches);
	free(grants->map);
	free(grants);
}

size_t sa_grants_stretches(const sa_grants *grants)
{
	return grants->nstretches;
}

int sa_grants_compare(const sa_grants *grants, int file, int *ret_equal)
{
	*ret_equal = 0;
	for (size_t i = 0; i < grants->nstretches; i++) {
		const struct stretch *stretch = &grants->stretches[i];
		uint64_t equal;
		int error;

		if (stretch->beside == NULL)
			return -EINVAL;
		error = sa_compare_pages(file, stretch->page, stretch->count, stretch->beside, &equal);
		if (error)
			return error;
		if (equal < stretch->count)
			return 0;
	}
	*ret_equal = 1;
	return 0;
}

static int place_moved(struct stretch *stretch, uint8_t *at)
{
	if (mremap(stretch->beside, stretch->bytes, stretch->bytes, MREMAP_MAYMOVE | MREMAP_FIXED, at) == MAP_FAILED)
		return -errno;
	stretch->beside = NULL;
	return 0;
}

static int place_again(const sa_grants *grants, int device, struct walk *walk, struct stretch *stretch, uint8_t *at)
{
	const uint32_t count = walk_stretch(walk, grants->domid, stretch->count, grants->map->refs, &(uint32_t){0});
	uint8_t *mapped;

	/* Makes room in the hypervisor for what follows; the first half keeps every reference in use. */
	if (munmap(stretch->beside + pages_bytes(count), pages_bytes(count)) < 0)
		return -errno;
	stretch->bytes = pages_bytes(count);
	return map_references(grants, device, count, at, &mapped);
}

int sa_grants_place(sa_grants *grants, int device, void *base, uint64_t npages, int file, size_t *ret_placed)
{
	struct walk walk = {.runs = grants->runs, .nruns = grants->nruns};
	int error;

	*ret_placed = 0;
	error = sa_check_runs(base, npages, grants->runs, grants->nruns);
	if (error)
		return error;
	for (size_t i = 0; i < grants->nstretches; i++) {
		if (grants->stretches[i].beside == NULL)
			return -EINVAL;
	}
	error = grants->nstretches ? sa_map_reserve() : 0;
	for (size_t i = 0; !error && i < grants->nstretches; i++) {
		struct stretch *stretch = &grants->stretches[i];
		uint8_t *at = (uint8_t *)base + (uint64_t)stretch->page * SA_PAGE_SIZE;

		if (grants->movable)
			error = place_moved(stretch, at);
		else
			error = place_again(grants, device, &walk, stretch, at);
		if (error) {
			/* There may be a hole. Its own error would say less than the one that made it. */
			(void)sa_map_file(base, file, stretch->page, stretch->count, 0);
			return error;
		}
		if (stretch->beside) {
			if (munmap(stretch->beside, stretch->bytes) < 0)
				return -errno;
			stretch->beside = NULL;
		}
		*ret_placed = i + 1;
	}
	return error;
}
