/*
 * preload.c - the functions that libsharearea_preload.so puts in front of libc's, and what starts it in a program.
 *
 * Each does what libc's does, and keeps the table of shim_regions.c right on the way: whatever is going to change a
 * mapping under which there are shared pages finds the file's own pages there. errno is touched only where the call
 * itself fails.
 */
#include "shim.h"

#include <asm/unistd.h>
#include <dlfcn.h>
#include <errno.h>
#include <grp.h>
#include <linux/sched.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum { PAGE = 4096 };

static long result_of(long result)
{
	if (result >= 0 || result < -4095)
		return result;
	errno = (int)-result;
	return -1;
}

typedef void (*function)(void);

/* libc's function of this name. dlsym says nothing of its own for a name that is there. */
static function real(_Atomic(function) *known, const char *name)
{
	function found = *known;
	void *address;

	if (found == NULL) {
		address = dlsym(RTLD_NEXT, name);
		memcpy(&found, &address, sizeof found); /* POSIX has them alike, C does not say so */
		*known = found;
	}
	return found;
}

/* ---------------------------------------------------------------------------------------------------- mappings */

static long map(uintptr_t start, size_t length, int protection, int flags, int fd, off_t offset)
{
	const bool fixed = (flags & MAP_FIXED) && (flags & MAP_FIXED_NOREPLACE) != MAP_FIXED_NOREPLACE;
	const bool learn = fd >= 0 && !(flags & MAP_ANONYMOUS) && (protection & (PROT_READ | PROT_WRITE)) == PROT_READ;
	const bool watched = sa_shim_watches() && (fixed || learn);
	struct sa_held held;
	long result = 0;

	if (watched)
		sa_shim_lock(&held);
	if (watched && fixed)
		result = sa_shim_put_back_edges(start, length);
	if (result == 0)
		result = sa_call(__NR_mmap, (long)start, (long)length, protection, flags, fd, (long)offset);
	if (watched && fixed && (result >= 0 || result < -4095))
		sa_shim_gone(start, length);
	if (watched && learn && (result >= 0 || result < -4095))
		sa_shim_mapped((uintptr_t)result, length);
	if (watched)
		sa_shim_unlock(&held);
	return result;
}

EXPORT void *mmap(void *start, size_t length, int protection, int flags, int fd, off_t offset)
{
	return (void *)result_of(map((uintptr_t)start, length, protection, flags, fd, offset));
}

EXPORT void *mmap64(void *start, size_t length, int protection, int flags, int fd, off64_t offset)
{
	return (void *)result_of(map((uintptr_t)start, length, protection, flags, fd, offset));
}

static long unmap(uintptr_t start, size_t length)
{
	struct sa_held held;
	long result;

	if (!sa_shim_watches() || start % PAGE || length == 0)
		return sa_call(__NR_munmap, (long)start, (long)length, 0, 0, 0, 0);
	sa_shim_lock(&held);
	result = sa_shim_put_back_edges(start, length);
	if (result == 0)
		result = sa_call(__NR_munmap, (long)start, (long)length, 0, 0, 0, 0);
	if (result == 0)
		sa_shim_gone(start, length);
	sa_shim_unlock(&held);
	return result;
}

EXPORT int munmap(void *start, size_t length)
{
	return (int)result_of(unmap((uintptr_t)start, length));
}

/* A call about a range whose regions have to be the file's own before it. */
static long over(uintptr_t start, size_t length, bool again, long number, long c, long d)
{
	struct sa_held held;
	long result;

	if (!sa_shim_watches())
		return sa_call(number, (long)start, (long)length, c, d, 0, 0);
	sa_shim_lock(&held);
	result = sa_shim_put_back(start, length, again);
	if (result == 0)
		result = sa_call(number, (long)start, (long)length, c, d, 0, 0);
	sa_shim_unlock(&held);
	return result;
}

EXPORT int mprotect(void *start, size_t length, int protection)
{
	return (int)result_of(over((uintptr_t)start, length, true, __NR_mprotect, protection, 0));
}

EXPORT int pkey_mprotect(void *start, size_t length, int protection, int key)
{
	const long number = key == -1 ? __NR_mprotect : __NR_pkey_mprotect;

	return (int)result_of(over((uintptr_t)start, length, key == -1, number, protection, key));
}

static long remap(uintptr_t start, size_t length, size_t length_now, int flags, uintptr_t there)
{
	const bool stays = flags & MREMAP_DONTUNMAP;
	struct sa_held held;
	bool known;
	long result;

	if (!sa_shim_watches())
		return sa_call(__NR_mremap, (long)start, (long)length, (long)length_now, flags, (long)there, 0);
	sa_shim_lock(&held);
	known = sa_shim_knows(start, length ? length : PAGE);
	result = sa_shim_put_back(start, length ? length : PAGE, true);
	if (result == 0 && (flags & MREMAP_FIXED))
		result = sa_shim_put_back_edges(there, length_now);
	if (result == 0)
		result = sa_call(__NR_mremap, (long)start, (long)length, (long)length_now, flags, (long)there, 0);
	if (result >= 0 || result < -4095) {
		if (flags & MREMAP_FIXED)
			sa_shim_gone(there, length_now);
		if (result != (long)start && !stays)
			sa_shim_gone(start, length);
		/* What it was nobody knows here: the look finds out, if it is a file's. */
		if (known)
			sa_shim_mapped((uintptr_t)result, length_now);
	}
	sa_shim_unlock(&held);
	return result;
}

EXPORT void *mremap(void *start, size_t length, size_t length_now, int flags, ...)
{
	uintptr_t there = 0;
	va_list rest;

	va_start(rest, flags);
	if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP))
		there = (uintptr_t)va_arg(rest, void *);
	va_end(rest);
	return (void *)result_of(remap((uintptr_t)start, length, length_now, flags, there));
}

/* Advice that changes neither bytes nor rights nor what children get, and that the kernel keeps nowhere. */
static bool is_harmless(int advice)
{
	return advice == MADV_DONTNEED || advice == MADV_WILLNEED || advice == MADV_COLD || advice == MADV_PAGEOUT ||
	       advice == MADV_POPULATE_READ;
}

static long advise(uintptr_t start, size_t length, int advice)
{
	const bool again = advice == MADV_NORMAL || advice == MADV_RANDOM || advice == MADV_SEQUENTIAL;

	if (is_harmless(advice))
		return sa_call(__NR_madvise, (long)start, (long)length, advice, 0, 0, 0);
	return over(start, length, again, __NR_madvise, advice, 0);
}

EXPORT int madvise(void *start, size_t length, int advice)
{
	return (int)result_of(advise((uintptr_t)start, length, advice));
}

EXPORT int posix_madvise(void *start, size_t length, int advice)
{
	/* As in glibc: POSIX_MADV_DONTNEED would be MADV_DONTNEED, which loses data of other mappings. */
	return advice == POSIX_MADV_DONTNEED ? 0 : (int)-advise((uintptr_t)start, length, advice);
}

EXPORT int mlock(const void *start, size_t length)
{
	return (int)result_of(over((uintptr_t)start, length, false, __NR_mlock, 0, 0));
}

EXPORT int mlock2(const void *start, size_t length, unsigned flags)
{
	return (int)result_of(over((uintptr_t)start, length, false, __NR_mlock2, (long)flags, 0));
}

EXPORT int mlockall(int flags)
{
	sa_shim_stop(true);
	return (int)result_of(sa_call(__NR_mlockall, flags, 0, 0, 0, 0, 0));
}

/* ------------------------------------------------------------------------------------------------------ limits */

static long limit(pid_t pid, int resource, const struct rlimit *now, struct rlimit *before)
{
	if (now && resource == RLIMIT_AS && now->rlim_cur != RLIM_INFINITY)
		sa_shim_stop(true);
	return sa_call(__NR_prlimit64, pid, resource, (long)now, (long)before, 0, 0);
}

/* glibc declares the kinds of limits as an enumeration in C; the names are the same functions here. */
EXPORT int setrlimit(__rlimit_resource_t resource, const struct rlimit *now)
{
	return (int)result_of(limit(0, (int)resource, now, NULL));
}

EXPORT int setrlimit64(__rlimit_resource_t resource, const struct rlimit64 *now)
{
	return (int)result_of(limit(0, (int)resource, (const struct rlimit *)now, NULL));
}

EXPORT int prlimit(pid_t pid, enum __rlimit_resource resource, const struct rlimit *now, struct rlimit *before)
{
	return (int)result_of(limit(pid, (int)resource, now, before));
}

EXPORT int prlimit64(pid_t pid, enum __rlimit_resource resource, const struct rlimit64 *now, struct rlimit64 *before)
{
	return (int)result_of(limit(pid, (int)resource, (const struct rlimit *)now, (struct rlimit *)before));
}

/* ------------------------------------------------------------------------------------------------------ rights */

/* The thread has the rights that it was made with: end it, change the program's, make another one. */
#define WITH_OTHER_RIGHTS(call)                 \
	do {                                    \
		static _Atomic(function) known; \
		int result;                     \
		int error;                      \
                                                \
		sa_shim_stop(false);            \
		result = (call);                \
		error = errno;                  \
		sa_shim_resume();               \
		errno = error;                  \
		return result;                  \
	} while (0)

#define REAL(type, name) ((type)real(&known, name))

EXPORT int setuid(uid_t uid)
{
	WITH_OTHER_RIGHTS(REAL(int (*)(uid_t), "setuid")(uid));
}

EXPORT int seteuid(uid_t uid)
{
	WITH_OTHER_RIGHTS(REAL(int (*)(uid_t), "seteuid")(uid));
}

EXPORT int setreuid(uid_t ruid, uid_t euid)
{
	WITH_OTHER_RIGHTS(REAL(int (*)(uid_t, uid_t), "setreuid")(ruid, euid));
}

EXPORT int setresuid(uid_t ruid, uid_t euid, uid_t suid)
{
	WITH_OTHER_RIGHTS(REAL(int (*)(uid_t, uid_t, uid_t), "setresuid")(ruid, euid, suid));
}

EXPORT int setgid(gid_t gid)
{
	WITH_OTHER_RIGHTS(REAL(int (*)(gid_t), "setgid")(gid));
}

EXPORT int setegid(gid_t gid)
{
	WITH_OTHER_RIGHTS(REAL(int (*)(gid_t), "setegid")(gid));
}

EXPORT int setregid(gid_t rgid, gid_t egid)
{
	WITH_OTHER_RIGHTS(REAL(int (*)(gid_t, gid_t), "setregid")(rgid, egid));
}

EXPORT int setresgid(gid_t rgid, gid_t egid, gid_t sgid)
{
	WITH_OTHER_RIGHTS(REAL(int (*)(gid_t, gid_t, gid_t), "setresgid")(rgid, egid, sgid));
}

EXPORT int setgroups(size_t n, const gid_t *groups)
{
	WITH_OTHER_RIGHTS(REAL(int (*)(size_t, const gid_t *), "setgroups")(n, groups));
}

EXPORT int initgroups(const char *user, gid_t group)
{
	WITH_OTHER_RIGHTS(REAL(int (*)(const char *, gid_t), "initgroups")(user, group));
}

int capset(void *header, const void *data);

EXPORT int capset(void *header, const void *data)
{
	WITH_OTHER_RIGHTS(REAL(int (*)(void *, const void *), "capset")(header, data));
}

EXPORT int unshare(int flags)
{
	sa_shim_stop(true);
	return (int)result_of(sa_call(__NR_unshare, flags, 0, 0, 0, 0, 0));
}

EXPORT int setns(int fd, int kind)
{
	sa_shim_stop(true);
	return (int)result_of(sa_call(__NR_setns, fd, kind, 0, 0, 0, 0));
}

/* Returns whether sa_shim_resume has to follow. */
static bool before_prctl(long option)
{
	const bool rights = option == PR_SET_NO_NEW_PRIVS || option == PR_CAPBSET_DROP || option == PR_CAP_AMBIENT ||
	                    option == PR_SET_SECUREBITS;

	if (option == PR_SET_SECCOMP || rights)
		sa_shim_stop(option == PR_SET_SECCOMP);
	return rights;
}

EXPORT int prctl(int option, ...)
{
	long words[4];
	va_list rest;
	bool again;
	long result;

	va_start(rest, option);
	for (int i = 0; i < 4; i++)
		words[i] = va_arg(rest, long);
	va_end(rest);
	again = before_prctl(option);
	result = sa_call(__NR_prctl, option, words[0], words[1], words[2], words[3], 0);
	if (again)
		sa_shim_resume();
	return (int)result_of(result);
}

/* ------------------------------------------------------------------------------------------- children, libraries */

EXPORT int dlclose(void *handle)
{
	static _Atomic(function) known;
	int result;
	int error;

	if (!sa_shim_watches())
		return REAL(int (*)(void *), "dlclose")(handle);
	sa_shim_before_close();
	result = REAL(int (*)(void *), "dlclose")(handle);
	error = errno;
	sa_shim_after_close();
	errno = error;
	return result;
}

EXPORT pid_t _Fork(void)
{
	static _Atomic(function) known;
	pid_t pid;
	int error;

	sa_shim_before_fork();
	pid = REAL(pid_t(*)(void), "_Fork")();
	error = errno;
	if (pid == 0)
		sa_shim_after_fork_child();
	else
		sa_shim_after_fork_parent();
	errno = error;
	return pid;
}

EXPORT int clone(int (*run)(void *), void *stack, int flags, void *argument, ...)
{
	static _Atomic(function) known;
	va_list rest;
	void *words[3];

	va_start(rest, argument);
	for (int i = 0; i < 3; i++)
		words[i] = va_arg(rest, void *);
	va_end(rest);
	/* A child with a memory of its own would have shared pages there, and nobody to put them back. */
	if (!(flags & CLONE_VM))
		sa_shim_stop(true);
	return REAL(int (*)(int (*)(void *), void *, int, void *, ...), "clone")(run, stack, flags, argument, words[0],
	                                                                         words[1], words[2]);
}

/* ----------------------------------------------------------------------------------------------------- syscall */

static bool is_about_rights(long number)
{
	return number == __NR_setuid || number == __NR_setgid || number == __NR_setreuid || number == __NR_setregid ||
	       number == __NR_setresuid || number == __NR_setresgid || number == __NR_setgroups ||
	       number == __NR_capset;
}

static bool makes_a_child(long number, const long *words)
{
	if (number == __NR_clone)
		return !(words[0] & CLONE_VM);
	if (number == __NR_clone3)
		return words[0] == 0 || !(((const struct clone_args *)words[0])->flags & CLONE_VM);
	return number == __NR_fork;
}

/* The same calls without their names. */
static long call_by_number(long number, const long *words)
{
	const uintptr_t start = (uintptr_t)words[0];
	const size_t length = (size_t)words[1];
	bool again = false;
	long result;

	switch (number) {
	case __NR_mmap:
		return map(start, length, (int)words[2], (int)words[3], (int)words[4], words[5]);
	case __NR_munmap:
		return unmap(start, length);
	case __NR_mremap:
		return remap(start, length, (size_t)words[2], (int)words[3], (uintptr_t)words[4]);
	case __NR_mprotect:
	case __NR_pkey_mprotect:
		return over(start, length, true, number, words[2], words[3]);
	case __NR_madvise:
		return advise(start, length, (int)words[2]);
	case __NR_mlock:
	case __NR_mlock2:
		return over(start, length, false, number, words[2], 0);
	case __NR_setrlimit:
		return limit(0, (int)words[0], (const struct rlimit *)words[1], NULL);
	case __NR_prlimit64:
		return limit((pid_t)words[0], (int)words[1], (const struct rlimit *)words[2],
		             (struct rlimit *)words[3]);
	default:
		break;
	}
	if (number == __NR_unshare || number == __NR_setns || number == __NR_seccomp || number == __NR_mlockall ||
	    makes_a_child(number, words)) {
		sa_shim_stop(true);
	} else if (number == __NR_prctl) {
		again = before_prctl(words[0]);
	} else if (is_about_rights(number)) {
		sa_shim_stop(false);
		again = true;
	}
	result = sa_call(number, words[0], words[1], words[2], words[3], words[4], words[5]);
	if (again)
		sa_shim_resume();
	return result;
}

EXPORT long syscall(long number, ...)
{
	long words[6];
	va_list rest;

	va_start(rest, number);
	for (int i = 0; i < 6; i++)
		words[i] = va_arg(rest, long);
	va_end(rest);
	return result_of(call_by_number(number, words));
}

/* ------------------------------------------------------------------------------------------------------- start */

__attribute__((constructor)) static void start(void)
{
	const char *socket = getenv("SHAREAREA_AGENT_SOCKET");
	const int error = errno;

	/* In secure mode ld.so ignores LD_PRELOAD, but for folders that it trusts. */
	if (socket && getauxval(AT_SECURE) == 0 &&
	    pthread_atfork(sa_shim_before_fork, sa_shim_after_fork_parent, sa_shim_after_fork_child) == 0)
		sa_shim_start(socket, true);
	errno = error;
}
