/*
 * lease.c - read leases on files, and one descriptor that reports when somebody wants to write one of them.
 *
 * A writer (open for writing, truncate) waits in the kernel until the lease is given back, but no longer than the
 * seconds in /proc/sys/fs/lease-break-time. Here: taking, giving back, reading the reports. What is done in between is
 * the agent's.
 */
#include "sa.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/signalfd.h>
#include <unistd.h>

/* Queued with the descriptor in it, unlike SIGIO; clear of what glibc and common runtimes take. A call, not a number:
 * glibc keeps the first real-time signals for itself. */
#define LEASE_SIGNAL (SIGRTMIN + 8)

enum { REPORTS_AT_ONCE = 32 };

static int watched_signals(sigset_t *ret)
{
	if (sigemptyset(ret) < 0 || sigaddset(ret, LEASE_SIGNAL) < 0 || sigaddset(ret, SIGIO) < 0)
		return -errno;
	return 0;
}

int sa_lease_watch_open(int *ret_fd)
{
	sigset_t watched;
	sigset_t before;
	int error = watched_signals(&watched);

	*ret_fd = -1;
	if (error)
		return error;
	error = pthread_sigmask(SIG_BLOCK, &watched, &before);
	if (error)
		return -error;
	*ret_fd = signalfd(-1, &watched, SFD_NONBLOCK | SFD_CLOEXEC);
	if (*ret_fd < 0) {
		error = -errno;
		/* Cannot fail: the mask and the verb are good. */
		(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	}
	return error;
}

int sa_lease_take(int fd)
{
	if (fcntl(fd, F_SETSIG, LEASE_SIGNAL) < 0)
		return -errno;
	/* Without it F_SETLEASE makes the calling thread the owner, and a thread that has ended is told nothing (seen).
	 * The process is the owner, so that the signal reaches the watch whoever took the lease. */
	if (fcntl(fd, F_SETOWN, getpid()) < 0)
		return -errno;
	if (fcntl(fd, F_SETLEASE, F_RDLCK) < 0)
		return -errno;
	return 0;
}

int sa_lease_release(int fd)
{
	/* EAGAIN: there is none (fs/locks.c, generic_delete_lease). */
	if (fcntl(fd, F_SETLEASE, F_UNLCK) < 0 && errno != EAGAIN)
		return -errno;
	return 0;
}

int sa_lease_held(int fd, int *ret_held)
{
	/* While a lease is being broken this is what it will become. */
	const int type = fcntl(fd, F_GETLEASE);

	*ret_held = type == F_RDLCK;
	return type < 0 ? -errno : 0;
}

int sa_file_is_quiet(int fd, int *ret_quiet)
{
	*ret_quiet = 0;
	/* A writer may come in between: what he sets off must end nobody. SIGURG is ignored unless somebody wants it. */
	if (fcntl(fd, F_SETSIG, SIGURG) < 0)
		return -errno;
	if (fcntl(fd, F_SETLEASE, F_RDLCK) < 0)
		return 0;
	*ret_quiet = 1;
	return sa_lease_release(fd);
}

/* A report that the kernel sent for a descriptor. Anything else under our signal number was sent by a process. */
static bool is_report(const struct signalfd_siginfo *info)
{
	return info->ssi_signo == (uint32_t)LEASE_SIGNAL &&
	       (info->ssi_code == SI_SIGIO || (info->ssi_code >= POLL_IN && info->ssi_code <= POLL_HUP));
}

int sa_lease_watch_read(int watch_fd, int *ret_fds, size_t max, size_t *ret_n, int *ret_overflow)
{
	struct signalfd_siginfo infos[REPORTS_AT_ONCE];

	*ret_n = 0;
	*ret_overflow = 0;
	while (*ret_n < max) {
		const size_t room = max - *ret_n < REPORTS_AT_ONCE ? max - *ret_n : REPORTS_AT_ONCE;
		const ssize_t n = read(watch_fd, infos, room * sizeof infos[0]);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return 0;
		if (n < 0)
			return -errno;
		if (n == 0 || (size_t)n % sizeof infos[0] != 0)
			return -EIO;
		for (size_t i = 0; i < (size_t)n / sizeof infos[0]; i++) {
			/* SIGIO comes instead of a report that found no room in the queue; a forged one is worth no
			 * more than a question to every lease. */
			if (is_report(&infos[i]))
				ret_fds[(*ret_n)++] = infos[i].ssi_fd;
			else
				*ret_overflow = 1;
		}
	}
	return 0;
}
