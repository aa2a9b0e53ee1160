/*
 * shim_sync.c - how the program's threads, the shim's own thread and forked children wait for one another: the lock,
 * the thread, made, woken and waited for, and the page in which children say that they are done.
 *
 * What is kept under the lock is shim_regions.c's, what the thread does shim.c's.
 */
#include "shim_parts.h"

#include <asm/unistd.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum {
	WAKE_SIGNAL = 33, /* glibc's own (SIGSETXID), which it sends to its own threads only */
	SIGNAL_BYTES = 8,
	STACK_BYTES = 65536,
	MAX_CHILDREN = 256, /* forked children that have not put their pages back */
	MS_CHILDREN = 500   /* for children that were forked: less than the shortest lease_timeout */
};

_Atomic bool sa_stopping;
_Atomic bool sa_dirty;
_Atomic bool sa_emptied;

static _Atomic uint32_t lock_word;  /* 0 free, 1 taken, 2 taken and waited for */
static _Atomic uint32_t thread_tid; /* cleared by the kernel when the thread is gone */
static int32_t process;             /* whose thread it is */
static int signal_fd;               /* the thread's alone */
static uint8_t stack[STACK_BYTES] __attribute__((aligned(64)));

static _Atomic(_Atomic uint32_t *) children; /* a page that children share: numbers of forks that are not done */
/* With the lock. */
static uint32_t forks;
static uint32_t fork_number; /* of the fork under way; 0: nothing is shared */

static const uint64_t all_signals = ~0ULL;

/* ---------------------------------------------------------------------------------------------------- the lock */

void sa_lock(void)
{
	uint32_t free = 0;

	if (atomic_compare_exchange_strong(&lock_word, &free, 1))
		return;
	while (atomic_exchange(&lock_word, 2) != 0)
		sa_futex_wait(&lock_word, 2, FUTEX_PRIVATE_FLAG, -1);
}

void sa_unlock(void)
{
	if (atomic_exchange(&lock_word, 0) == 2)
		(void)sa_call3(__NR_futex, sa_at(&lock_word), FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1);
}

void sa_signals_block(uint64_t *ret)
{
	(void)sa_call(__NR_rt_sigprocmask, SIG_SETMASK, sa_at(&all_signals), sa_at(ret), SIGNAL_BYTES, 0, 0);
}

void sa_signals_restore(const uint64_t *signals)
{
	(void)sa_call(__NR_rt_sigprocmask, SIG_SETMASK, sa_at(signals), 0, SIGNAL_BYTES, 0, 0);
}

void sa_shim_lock(struct sa_held *ret)
{
	sa_signals_block(&ret->signals);
	sa_lock();
}

void sa_shim_unlock(const struct sa_held *held)
{
	sa_unlock();
	sa_signals_restore(&held->signals);
}

/* -------------------------------------------------------------------------------------------------- the thread */

/* A thread of this process that shares the address space and nothing else that it can do without. Descriptors are
 * shared for its first moment only: copying them would keep them open until it has closed its copies. */
static long make_thread(void (*run)(void))
{
	const unsigned long flags = CLONE_VM | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_FILES |
	                            CLONE_UNTRACED | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID;
	uint8_t *top = stack + sizeof stack - 64;
	register long r10 __asm__("r10") = sa_at(&thread_tid);
	register long r8 __asm__("r8") = 0;
	long result;

	memcpy(top, &run, sizeof run);
	__asm__ volatile("syscall\n\t"
	                 "test %%rax, %%rax\n\t"
	                 "jnz 1f\n\t"
	                 "xor %%ebp, %%ebp\n\t"
	                 "call *(%%rsp)\n\t"
	                 "mov %[exit], %%eax\n\t"
	                 "xor %%edi, %%edi\n\t"
	                 "syscall\n\t"
	                 "hlt\n"
	                 "1:"
	                 : "=a"(result)
	                 : "a"((long)__NR_clone), "D"(flags), "S"(top), "d"(&thread_tid), "r"(r10),
	                   "r"(r8), [exit] "i"(__NR_exit)
	                 : "rcx", "r11", "memory");
	return result;
}

bool sa_thread_make(void (*run)(void))
{
	process = (int32_t)sa_call3(__NR_getpid, 0, 0, 0);
	atomic_store(&sa_stopping, false);
	if (make_thread(run) >= 0)
		return true;
	atomic_store(&thread_tid, 0);
	return false;
}

bool sa_thread_is_ours(void)
{
	return process == (int32_t)sa_call3(__NR_getpid, 0, 0, 0);
}

bool sa_thread_runs(void)
{
	return atomic_load(&thread_tid) != 0;
}

void sa_thread_wake(void)
{
	const uint32_t tid = atomic_load(&thread_tid);

	if (tid != 0)
		(void)sa_call3(__NR_tgkill, process, (long)tid, WAKE_SIGNAL); /* gone already: nobody to wake */
}

void sa_thread_await_end(int64_t end)
{
	const uint32_t before = atomic_load(&thread_tid);
	uint32_t tid = before;

	while (tid != 0 && sa_now_ms() < end) {
		sa_futex_wait(&thread_tid, tid, 0, end - sa_now_ms());
		tid = atomic_load(&thread_tid);
	}
	/* The kernel clears the number a moment before the thread has left the process. */
	while (before != 0 && sa_call3(__NR_tgkill, process, (long)before, 0) == 0 && sa_now_ms() < end)
		(void)sa_call3(__NR_nanosleep, sa_at(&(struct timespec){0, 20000}), 0, 0);
}

void sa_thread_none(void)
{
	atomic_store(&thread_tid, 0);
}

bool sa_wait_begin(void)
{
	const uint64_t wake = 1ULL << (WAKE_SIGNAL - 1);

	signal_fd = (int)sa_call(__NR_signalfd4, -1, sa_at(&wake), SIGNAL_BYTES, O_NONBLOCK | O_CLOEXEC, 0, 0);
	return signal_fd >= 0;
}

int sa_wait(int fd, short events, int64_t ms, bool *ret_go)
{
	struct pollfd polled[2] = {{.fd = signal_fd, .events = POLLIN}, {.fd = fd, .events = events}};
	struct timespec time = {ms / 1000, ms % 1000 * 1000000}; /* the kernel writes to it */
	uint8_t info[128];                                       /* a signalfd_siginfo */

	polled[1].revents = 0;
	if (!atomic_load(&sa_stopping))
		(void)sa_call(__NR_ppoll, sa_at(polled), 2, sa_at(&time), 0, 0, 0);
	while (polled[0].revents & POLLIN && sa_call3(__NR_read, signal_fd, sa_at(info), sizeof info) > 0)
		;
	*ret_go = !atomic_load(&sa_stopping);
	return polled[1].revents;
}

bool sa_pause_ms(int64_t ms)
{
	const int64_t end = sa_now_ms() + ms;
	bool go = !atomic_load(&sa_stopping);

	for (int64_t left = ms; go && left > 0; left = end - sa_now_ms())
		(void)sa_wait(-1, 0, left, &go);
	return go;
}

/* ---------------------------------------------------------------------------------------------------- children */

bool sa_children_begin(void)
{
	long mapped;

	if (atomic_load(&children))
		return true;
	mapped = sa_call(__NR_mmap, 0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (mapped < 0)
		return false;
	atomic_store(&children, (_Atomic uint32_t *)(uintptr_t)mapped);
	return true;
}

void sa_children_fork(bool shared)
{
	_Atomic uint32_t *numbers = atomic_load(&children);

	fork_number = 0;
	if (numbers == NULL || !shared)
		return;
	fork_number = ++forks ? forks : ++forks;
	atomic_store(&numbers[fork_number % MAX_CHILDREN], fork_number);
}

void sa_children_done(void)
{
	_Atomic uint32_t *numbers = atomic_load(&children);
	uint32_t number = fork_number;

	if (numbers == NULL)
		return;
	if (number && atomic_compare_exchange_strong(&numbers[number % MAX_CHILDREN], &number, 0))
		(void)sa_call3(__NR_futex, (long)(uintptr_t)&numbers[fork_number % MAX_CHILDREN], FUTEX_WAKE, INT_MAX);
	/* The parent's; for our own children another. */
	(void)sa_call3(__NR_munmap, (long)(uintptr_t)numbers, PAGE, 0);
	atomic_store(&children, NULL);
}

void sa_children_wait(void)
{
	_Atomic uint32_t *numbers = atomic_load(&children);
	const int64_t end = sa_now_ms() + MS_CHILDREN;

	for (size_t i = 0; numbers && i < MAX_CHILDREN; i++) {
		uint32_t number = atomic_load(&numbers[i]);
		int64_t left = end - sa_now_ms();

		while (number && atomic_load(&numbers[i]) == number && left > 0) {
			sa_futex_wait(&numbers[i], number, 0, left);
			left = end - sa_now_ms();
		}
		/* It was killed before it could, or there was none: fork failed. */
		if (number)
			(void)atomic_compare_exchange_strong(&numbers[i], &number, 0);
	}
}
