/*
 * test_gntdev.c - gntdev.c as far as it goes without Xen: its declarations against the kernel's, joining of runs, what a
 * descriptor of a private mount refuses, and that a refused map leaves nothing behind.
 *
 * Grants themselves are tests/xen/guest_probe.py's, in a guest.
 */
#include "check.h"
#include "gntdev_abi.h"
#include "sa.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if __has_include(<xen/gntdev.h>)
/* The kernel's header takes these from headers that it does not install. */
typedef uint32_t grant_ref_t;
typedef uint16_t domid_t;
#include <xen/gntdev.h>

static void test_declarations(void)
{
	const struct ioctl_gntdev_map_grant_ref *theirs = NULL;

	CHECK(sizeof(struct gntdev_ref) == sizeof(struct ioctl_gntdev_grant_ref));
	CHECK(offsetof(struct gntdev_ref, ref) == offsetof(struct ioctl_gntdev_grant_ref, ref));
	CHECK(sizeof(struct gntdev_map) + sizeof(struct gntdev_ref) == sizeof(*theirs));
	CHECK(offsetof(struct gntdev_map, count) == offsetof(struct ioctl_gntdev_map_grant_ref, count));
	CHECK(offsetof(struct gntdev_map, index) == offsetof(struct ioctl_gntdev_map_grant_ref, index));
	CHECK(offsetof(struct gntdev_map, refs) == offsetof(struct ioctl_gntdev_map_grant_ref, refs));
	CHECK(sizeof(struct gntdev_unmap) == sizeof(struct ioctl_gntdev_unmap_grant_ref));
	CHECK(offsetof(struct gntdev_unmap, count) == offsetof(struct ioctl_gntdev_unmap_grant_ref, count));
	CHECK(GNTDEV_MAP == IOCTL_GNTDEV_MAP_GRANT_REF);
	CHECK(GNTDEV_UNMAP == IOCTL_GNTDEV_UNMAP_GRANT_REF);
}
#else
static void test_declarations(void)
{
	fprintf(stderr, "test_gntdev: no <xen/gntdev.h> to compare with\n");
}
#endif

static int is_run(const struct sa_run *run, uint32_t page, uint32_t slot, uint32_t count)
{
	return run->page == page && run->slot == slot && run->count == count;
}

static void test_join(void)
{
	/* Three that follow one another with references from anywhere, a gap, one, a step back, one up to the last page. */
	const struct sa_run runs[] = {
		{0, 900, 2}, {2, 8, 1}, {3, 7, 3}, {7, 10, 1}, {6, 9, 1}, {UINT32_MAX - 1, 3, 2},
	};
	const struct sa_run none[] = {{0, 8, 1}, {1, 9, 0}};
	const struct sa_run beyond[] = {{UINT32_MAX, 8, 2}};
	const struct sa_run many[] = {{0, 8, UINT32_MAX}, {7, 8, 1}};
	struct sa_run joined[6];
	size_t n = 99;

	CHECK(sa_join_runs(runs, 6, joined, &n) == 0);
	if (CHECK(n == 4)) {
		CHECK(is_run(&joined[0], 0, 0, 6));
		CHECK(is_run(&joined[1], 7, 6, 1));
		CHECK(is_run(&joined[2], 6, 7, 1));
		CHECK(is_run(&joined[3], UINT32_MAX - 1, 8, 2));
	}
	CHECK(sa_join_runs(NULL, 0, joined, &n) == 0 && n == 0);
	CHECK(sa_join_runs(none, 2, joined, &n) == -EINVAL);
	CHECK(sa_join_runs(beyond, 1, joined, &n) == -ERANGE);
	CHECK(sa_join_runs(many, 2, joined, &n) == -ERANGE);
}

static int make_file(char *ret_path, size_t size)
{
	const char *folder = getenv("SA_TEST_DIR");
	char page[SA_PAGE_SIZE];
	int fd;

	snprintf(ret_path, size, "%s/sa_gntdev_XXXXXX", folder ? folder : ".");
	fd = mkstemp(ret_path);
	if (!CHECK(fd >= 0))
		exit(check_done("test_gntdev"));
	for (int i = 0; i < 4; i++) {
		memset(page, 'a' + i, sizeof page);
		CHECK(write(fd, page, sizeof page) == sizeof page);
	}
	return fd;
}

static void test_open(void)
{
	char path[4096];
	const int made = make_file(path, sizeof path);
	int fd = -1;
	int noexec = -1;

	CHECK(sa_grants_open(path, &fd, &noexec) == 0);
	CHECK(fcntl(fd, F_GETFL) != -1 && (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY);
	CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
	CHECK(noexec == 0 || noexec == 1);
	CHECK(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EACCES);
	if (noexec == 1) {
		void *page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);

		CHECK(mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EPERM);
		CHECK(page != MAP_FAILED);
		CHECK(mprotect(page, 4096, PROT_READ | PROT_EXEC) < 0 && errno == EACCES);
		CHECK(mprotect(page, 4096, PROT_READ | PROT_WRITE) < 0 && errno == EACCES);
		CHECK(munmap(page, 4096) == 0);
	} else {
		fprintf(stderr, "test_gntdev: no right to a private mount\n");
	}
	CHECK(close(fd) == 0);
	CHECK(unlink(path) == 0);
	CHECK(sa_grants_open(path, &fd, &noexec) == -ENOENT && fd == -1);
	CHECK(close(made) == 0);
}

/* A device that knows no grants refuses the ioctl: nothing has happened then. */
static void test_refused(void)
{
	const struct sa_run good[] = {{0, 8, 2}, {2, 20, 1}};
	const struct sa_run empty[] = {{0, 8, 0}};
	const struct sa_run beyond[] = {{0, UINT32_MAX, 2}};
	const struct sa_run large[] = {{0, 8, 40000}, {50000, 8, 200000}}; /* more than one ioctl takes */
	const int device = open("/dev/null", O_RDONLY | O_CLOEXEC);
	uint64_t ioctls[2];
	uint64_t mmaps[2];
	uint64_t pages[2];
	sa_grants *grants = NULL;

	CHECK(device >= 0);
	sa_grants_calls(&ioctls[0], &mmaps[0], &pages[0]);
	for (int movable = 0; movable < 2; movable++) {
		CHECK(sa_grants_create(device, 1, good, 2, movable, &grants) == -ENOTTY && grants == NULL);
		CHECK(sa_grants_create(-1, 1, good, 2, movable, &grants) == -EBADF && grants == NULL);
		CHECK(sa_grants_create(device, 1, empty, 1, movable, &grants) == -EINVAL && grants == NULL);
		CHECK(sa_grants_create(device, 1, beyond, 1, movable, &grants) == -ERANGE && grants == NULL);
		CHECK(sa_grants_create(device, 1, large, 1, movable, &grants) == -ENOTTY && grants == NULL);
		CHECK(sa_grants_create(device, 1, large, 2, movable, &grants) == -ENOTTY && grants == NULL);
	}
	sa_grants_calls(&ioctls[1], &mmaps[1], &pages[1]);
	CHECK(ioctls[1] - ioctls[0] == 8);
	CHECK(mmaps[1] == mmaps[0] && pages[1] == pages[0]);
	CHECK(close(device) == 0);
	sa_grants_destroy(NULL);
}

/* No grants at all are fine, and change nothing. */
static void test_nothing(void)
{
	char path[4096];
	const int fd = make_file(path, sizeof path);
	char *base = mmap(NULL, 4 * SA_PAGE_SIZE, PROT_READ, MAP_SHARED, fd, 0);
	sa_grants *grants = NULL;
	size_t placed = 9;
	int equal = 0;

	CHECK(base != MAP_FAILED);
	if (CHECK(sa_grants_create(-1, 1, NULL, 0, 1, &grants) == 0)) {
		CHECK(sa_grants_stretches(grants) == 0);
		CHECK(sa_grants_compare(grants, fd, &equal) == 0 && equal == 1);
		CHECK(sa_grants_place(grants, -1, base, 4, fd, &placed) == 0 && placed == 0);
		CHECK(sa_grants_place(grants, -1, base + 1, 4, fd, &placed) == -EINVAL);
	}
	sa_grants_destroy(grants);
	CHECK(base[0] == 'a' && base[3 * SA_PAGE_SIZE] == 'd');
	CHECK(munmap(base, 4 * SA_PAGE_SIZE) == 0);
	CHECK(unlink(path) == 0 && close(fd) == 0);
}

int main(void)
{
	test_declarations();
	test_join();
	test_open();
	test_refused();
	test_nothing();
	return check_done("test_gntdev");
}
