/*
 * shim.h - shared pages under the file mappings of a program that does not know of them. docs/preload.md is the design.
 *
 * The shim keeps a table of mappings and has a thread that talks to the agent; shim_parts.h says which file does what.
 * preload.c, which has the functions that are put in front of libc's, and library.c call what is declared here. No
 * function sets errno, allocates, or prints.
 */
#ifndef SA_SHIM_H
#define SA_SHIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A system call, made directly: the result, or -errno. */
static inline long sa_call(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall"
	                 : "=a"(result)
	                 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
	                 : "rcx", "r11", "memory");
	return result;
}

/* Start the thread, unless this process is one to be left alone. Once. socket: path of the agent's socket. whole: learn
 * the mappings that are there, and libraries that come later, besides what sa_shim_mapped says; then, while there is
 * one thread. */
void sa_shim_start(const char *socket, bool whole);

/* Whether mappings are watched: if not, nobody has to ask. */
bool sa_shim_watches(void);

/* The lock, with all signals blocked. Between the two: system calls only. */
struct sa_held {
	uint64_t signals;
};
void sa_shim_lock(struct sa_held *ret);
void sa_shim_unlock(const struct sa_held *held);

/* All of these with the lock held; a range is rounded outwards to pages. */

/* Put the file's pages back where the range meets a region, and forget those regions. again: they may be shared once
 * more when they are found unchanged in kind. -errno: pages could not be put back (the regions are still shared). */
int sa_shim_put_back(uintptr_t start, size_t length, bool again);
/* The same for all but what lies wholly inside the range, which is about to be replaced or unmapped. */
int sa_shim_put_back_edges(uintptr_t start, size_t length);
/* The range was replaced or unmapped. */
void sa_shim_gone(uintptr_t start, size_t length);
/* Whether the range meets anything that was learned or said to be mapped. */
bool sa_shim_knows(uintptr_t start, size_t length);
/* The program has mapped a file there, read only. */
void sa_shim_mapped(uintptr_t start, size_t length);

/* Bytes of a range that are shared at this moment. With the lock. */
size_t sa_shim_shared(uintptr_t start, size_t length);

/* Everything back, and no thread. forever: nothing is shared any more in this process and its children. Else
 * sa_shim_resume starts again. Without the lock. */
void sa_shim_stop(bool forever);
void sa_shim_resume(void);

/* Around fork, in the thread that forks. */
void sa_shim_before_fork(void);
void sa_shim_after_fork_parent(void);
void sa_shim_after_fork_child(void);

/* Around dlclose. */
void sa_shim_before_close(void);
void sa_shim_after_close(void);

#endif
