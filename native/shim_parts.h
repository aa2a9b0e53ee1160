/*
 * shim_parts.h - what the files of the shim have of each other, lowest first; what they offer to others is shim.h.
 *
 *   shim_call.c   what is made of system calls alone: time, sleep, files
 *   shim_sync.c   the lock; the thread, made, woken and waited for; forked children
 *   shim.c        all the rest
 *
 * The thread is made by clone directly and shares the program's thread-local storage with the thread that made it. So
 * nothing in these files may touch errno, allocate, or call a function of libc that does: system calls go through sa_call,
 * memory is static.
 */
#ifndef SA_SHIM_PARTS_H
#define SA_SHIM_PARTS_H

#include "sa.h"
#include "shim.h"

#include <stdatomic.h>

#pragma GCC visibility push(hidden)

enum {
	PAGE = SA_PAGE_SIZE,
	MS_PATIENCE = 1000 /* for the thread's end, for room in the socket */
};

/* ---------------------------------------------------------------------------------------------------- shim_call.c */

static inline long sa_call3(long number, long a, long b, long c)
{
	return sa_call(number, a, b, c, 0, 0, 0);
}

static inline long sa_at(const void *pointer)
{
	return (long)(uintptr_t)pointer;
}

int64_t sa_now_ms(void);

/* Sleep while *word is value, ms at the most; for any time if it is below 0. Whoever else wakes it must look again.
 * private: FUTEX_PRIVATE_FLAG, or 0 for a word that the kernel or another process changes. */
void sa_futex_wait(const _Atomic uint32_t *word, uint32_t value, int private, int64_t ms);

/* Close what is open and set it to -1. */
void sa_close_fd(int *fd);

/* Open to read: a descriptor or -errno. */
int sa_open_read(const char *path);

/* read(2), again when a signal interrupts it. */
long sa_read_some(int fd, void *into, size_t length);

/* Read so many bytes at an offset. pad: zeros to the end of a page that the file ends in. False: they are not there. */
bool sa_read_all(int fd, uint8_t *into, size_t length, uint64_t offset, bool pad);

/* The number that a file of /proc begins with; 0 if it cannot be read. */
uint64_t sa_first_number(const char *path);

/* ---------------------------------------------------------------------------------------------------- shim_sync.c */

/* The lock, for the thread, whose signals are blocked anyway; for the program's it is sa_shim_lock. */
void sa_lock(void);
void sa_unlock(void);

/* All signals of the calling thread. */
void sa_signals_block(uint64_t *ret);
void sa_signals_restore(const uint64_t *signals);

/* What the program's threads tell the thread. */
extern _Atomic bool sa_stopping; /* it is to end */
extern _Atomic bool sa_dirty;    /* something was mapped since the last look */
extern _Atomic bool sa_emptied;  /* regions went away: a file may have none left */

/* Make the thread. With signals blocked, and the lock or alone. */
bool sa_thread_make(void (*run)(void));
/* Whether it is a thread of this process, not of the one that this was forked from. */
bool sa_thread_is_ours(void);
bool sa_thread_runs(void);
/* End its sa_wait or sa_pause_ms. */
void sa_thread_wake(void);
/* Until it has left the process, or it is so late (sa_now_ms). */
void sa_thread_await_end(int64_t end);
/* In a forked child: it has none. */
void sa_thread_none(void);

/* What the thread does all three with. Once, before the others; false: it cannot be. */
bool sa_wait_begin(void);
/* Wait for a descriptor (-1: none) or a wake-up, ms at the most. Returns what poll says of the descriptor; false in
 * *ret_go: the thread is to end. */
int sa_wait(int fd, short events, int64_t ms, bool *ret_go);
/* Sleep that wake-ups do not shorten, but for the thread's end: then false. */
bool sa_pause_ms(int64_t ms);

/* Children that are forked while pages are shared. begin: with the lock, when there is a thread, true if they can be
 * told of. fork: with the lock, right before; shared: something is. done: in the child, when nothing is any more.
 * wait: the thread, until all are done. */
bool sa_children_begin(void);
void sa_children_fork(bool shared);
void sa_children_done(void);
void sa_children_wait(void);

#pragma GCC visibility pop

#endif
