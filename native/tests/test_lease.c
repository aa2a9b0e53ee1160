/*
 * test_lease.c - lease.c with real writers in other processes. They wait in the kernel, so nothing here has to.
 *
 * Files are made in $SA_TEST_DIR or the working folder. A report that never comes fails the test after PATIENCE_MS.
 */
#include "check.h"
#include "sa.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PATIENCE_MS = 30000 }; /* less than the 45 s after which the kernel breaks a lease by itself */

static int watch = -1;

struct file {
	char path[PATH_MAX];
	int fd; /* read only */
};

static struct file make_file(void)
{
	const char *folder = getenv("SA_TEST_DIR");
	struct file file;
	int fd;

	snprintf(file.path, sizeof file.path, "%s/sa_lease_XXXXXX", folder ? folder : ".");
	fd = mkstemp(file.path);
	if (!CHECK(fd >= 0 && write(fd, "content", 7) == 7 && close(fd) == 0))
		exit(check_done("test_lease"));
	file.fd = open(file.path, O_RDONLY | O_CLOEXEC);
	CHECK(file.fd >= 0);
	return file;
}

static void remove_file(const struct file *file)
{
	CHECK(close(file->fd) == 0);
	CHECK(unlink(file->path) == 0);
}

/* Another process that changes the file and says so in the pipe *ret_done when it has been let through. */
static pid_t start_writer(const char *path, bool truncates, int *ret_done)
{
	int ends[2];
	pid_t child;

	CHECK(pipe2(ends, O_CLOEXEC) == 0);
	fflush(NULL);
	child = fork();
	if (child == 0) {
		const int fd = truncates ? -1 : open(path, O_WRONLY | O_CLOEXEC);
		const bool good = truncates ? truncate(path, 0) == 0 : fd >= 0 && write(fd, "CONTENT", 7) == 7;

		_exit(good && write(ends[1], "x", 1) == 1 ? 0 : 1);
	}
	CHECK(child > 0 && close(ends[1]) == 0);
	CHECK(fcntl(ends[0], F_SETFL, O_NONBLOCK) == 0);
	*ret_done = ends[0];
	return child;
}

static bool let_through(int done)
{
	char byte;

	return read(done, &byte, 1) == 1;
}

static void end_writer(pid_t child, int done)
{
	int status = 1;

	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	CHECK(let_through(done));
	CHECK(close(done) == 0);
}

static bool wait_for_report(void)
{
	struct pollfd poller = {.fd = watch, .events = POLLIN};

	return poll(&poller, 1, PATIENCE_MS) == 1;
}

static bool nothing_reported(void)
{
	int fd;
	size_t n = 9;
	int overflow = 9;

	return sa_lease_watch_read(watch, &fd, 1, &n, &overflow) == 0 && n == 0 && overflow == 0;
}

static bool is_held(int fd)
{
	int held = 9;

	return CHECK(sa_lease_held(fd, &held) == 0) && held == 1;
}

/* A lease is on file.fd; a writer comes, is reported, waits, and goes on when the lease is given back. */
static void check_broken_by(const struct file *file, bool truncates)
{
	int fds[8] = {-1};
	size_t n = 0;
	int overflow = 9;
	int done;
	pid_t child;

	CHECK(is_held(file->fd));
	child = start_writer(file->path, truncates, &done);
	CHECK(wait_for_report());
	CHECK(sa_lease_watch_read(watch, fds, 8, &n, &overflow) == 0);
	CHECK(n == 1 && fds[0] == file->fd && overflow == 0);
	CHECK(!is_held(file->fd));
	CHECK(!let_through(done));
	CHECK(sa_lease_release(file->fd) == 0);
	end_writer(child, done);
	CHECK(!is_held(file->fd));
	CHECK(nothing_reported());
}

static void test_broken(void)
{
	const struct file file = make_file();

	CHECK(!is_held(file.fd));
	for (int i = 0; i < 3; i++) {
		CHECK(sa_lease_take(file.fd) == 0);
		check_broken_by(&file, i == 1);
	}
	remove_file(&file);
}

static void test_not_broken(void)
{
	const struct file file = make_file();
	char byte;
	int other;

	CHECK(sa_lease_take(file.fd) == 0);
	CHECK(sa_lease_take(file.fd) == 0);
	other = open(file.path, O_RDONLY | O_CLOEXEC);
	CHECK(other >= 0 && read(other, &byte, 1) == 1 && close(other) == 0);
	CHECK(is_held(file.fd) && nothing_reported());
	CHECK(sa_lease_release(file.fd) == 0);
	CHECK(!is_held(file.fd));
	CHECK(sa_lease_release(file.fd) == 0);
	other = open(file.path, O_WRONLY | O_CLOEXEC);
	CHECK(other >= 0 && nothing_reported());
	/* Somebody writes it already. */
	CHECK(sa_lease_take(file.fd) == -EAGAIN);
	CHECK(sa_lease_take(other) == -EAGAIN);
	CHECK(close(other) == 0);
	CHECK(sa_lease_take(file.fd) == 0 && sa_lease_release(file.fd) == 0);
	remove_file(&file);
}

static void test_quiet(void)
{
	const struct file file = make_file();
	int quiet = 0;
	int writer;

	CHECK(sa_file_is_quiet(file.fd, &quiet) == 0 && quiet == 1);
	CHECK(sa_lease_held(file.fd, &quiet) == 0 && quiet == 0); /* it is not kept */
	writer = open(file.path, O_RDWR);
	CHECK(writer >= 0 && sa_file_is_quiet(file.fd, &quiet) == 0 && quiet == 0);
	CHECK(close(writer) == 0);
	CHECK(sa_file_is_quiet(file.fd, &quiet) == 0 && quiet == 1);
	CHECK(sa_file_is_quiet(-1, &quiet) == -EBADF && quiet == 0);
	remove_file(&file);
}

static void test_mount(void)
{
	const int here = open("/", O_RDONLY);
	const int there = open("/proc", O_RDONLY);
	uint64_t first = 0;
	uint64_t second = 0;
	uint64_t again = 0;

	CHECK(sa_mount_id(here, &first) == 0 && sa_mount_id(there, &second) == 0 && sa_mount_id(here, &again) == 0);
	CHECK(first == again && (first == 0 ? second == 0 : first != second));
	CHECK(close(here) == 0 && close(there) == 0);
	CHECK(sa_mount_id(-1, &first) == -EBADF && first == 0);
}

static void test_errors(void)
{
	int held = 9;
	int fd;
	size_t n;
	int overflow;

	CHECK(sa_lease_take(-1) == -EBADF);
	CHECK(sa_lease_release(-1) == -EBADF);
	CHECK(sa_lease_held(-1, &held) == -EBADF && held == 0);
	CHECK(sa_lease_watch_read(-1, &fd, 1, &n, &overflow) == -EBADF && n == 0);
	CHECK(sa_lease_watch_read(watch, &fd, 0, &n, &overflow) == 0 && n == 0 && overflow == 0);
}

static void *take_in_thread(void *argument)
{
	const int *fd = argument;

	return sa_lease_take(*fd) == 0 ? NULL : argument;
}

/* The lease belongs to the process: it is reported after the thread that took it has ended. */
static void test_taken_by_a_thread(void)
{
	struct file file = make_file();
	pthread_t thread;
	void *failed = &file;

	CHECK(pthread_create(&thread, NULL, take_in_thread, &file.fd) == 0);
	CHECK(pthread_join(thread, &failed) == 0 && failed == NULL);
	check_broken_by(&file, false);
	remove_file(&file);
}

/* Reports wait in a queue and are read in parts. */
static void test_many(void)
{
	enum { MANY = 40 };
	struct file *files = calloc(MANY, sizeof *files);
	pid_t children[MANY];
	int dones[MANY];
	bool seen[MANY] = {false};
	size_t reports = 0;

	if (!CHECK(files != NULL))
		return;
	for (size_t i = 0; i < MANY; i++) {
		files[i] = make_file();
		CHECK(sa_lease_take(files[i].fd) == 0);
		children[i] = start_writer(files[i].path, false, &dones[i]);
	}
	while (reports < MANY && CHECK(wait_for_report())) {
		int fds[7];
		size_t n;
		int overflow;

		CHECK(sa_lease_watch_read(watch, fds, 7, &n, &overflow) == 0 && n > 0 && n <= 7 && overflow == 0);
		for (size_t k = 0; k < n; k++) {
			for (size_t i = 0; i < MANY; i++)
				seen[i] = seen[i] || files[i].fd == fds[k];
		}
		reports += n;
	}
	CHECK(reports == MANY && memchr(seen, false, sizeof seen) == NULL);
	for (size_t i = 0; i < MANY; i++) {
		CHECK(sa_lease_release(files[i].fd) == 0);
		end_writer(children[i], dones[i]);
		remove_file(&files[i]);
	}
	CHECK(nothing_reported());
	free(files);
}

/* A report that finds no room in the process's queue of signals becomes an overflow, and the lease tells. */
static void test_overflow(void)
{
	const struct file file = make_file();
	struct rlimit limit;
	struct rlimit none;
	int fds[4];
	size_t n = 9;
	int overflow = 0;
	int done;
	pid_t child;

	CHECK(getrlimit(RLIMIT_SIGPENDING, &limit) == 0);
	none = (struct rlimit){.rlim_cur = 0, .rlim_max = limit.rlim_max};
	CHECK(setrlimit(RLIMIT_SIGPENDING, &none) == 0);
	CHECK(sa_lease_take(file.fd) == 0);
	child = start_writer(file.path, false, &done);
	CHECK(wait_for_report());
	CHECK(sa_lease_watch_read(watch, fds, 4, &n, &overflow) == 0 && n == 0 && overflow == 1);
	CHECK(!is_held(file.fd));
	CHECK(!let_through(done));
	CHECK(sa_lease_release(file.fd) == 0);
	end_writer(child, done);
	CHECK(setrlimit(RLIMIT_SIGPENDING, &limit) == 0);
	CHECK(nothing_reported());
	remove_file(&file);
}

/* A signal that a process sent names no descriptor of ours: it is a reason to look, never a report. */
static void test_forged(void)
{
	int fds[4];
	size_t n = 9;
	int overflow = 0;

	CHECK(sigqueue(getpid(), SIGRTMIN + 8, (union sigval){.sival_int = 3}) == 0);
	CHECK(sa_lease_watch_read(watch, fds, 4, &n, &overflow) == 0 && n == 0 && overflow == 1);
	CHECK(nothing_reported());
}

int main(void)
{
	CHECK(sa_lease_watch_open(&watch) == 0 && watch >= 0);
	CHECK((fcntl(watch, F_GETFD) & FD_CLOEXEC) != 0 && (fcntl(watch, F_GETFL) & O_NONBLOCK) != 0);
	CHECK(nothing_reported());
	test_broken();
	test_not_broken();
	test_errors();
	test_quiet();
	test_mount();
	test_taken_by_a_thread();
	test_many();
	test_overflow();
	test_forged();
	CHECK(close(watch) == 0);
	return check_done("test_lease");
}
