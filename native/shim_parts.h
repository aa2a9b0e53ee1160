/*
 * shim_parts.h - what the files of the shim have of each other; what they offer to preload.c and library.c is shim.h.
 *
 *   shim_call.c     what is made of system calls alone: time, sleep, files
 *   shim_sync.c     the lock; the thread, made, woken and waited for; forked children
 *   shim_regions.c  the table of mappings, swaps and the way back, what the program says
 *   shim_look.c     what is mapped, by /proc, and which of it becomes a region
 *   shim_link.c     the connection to the agent
 *   shim_files.c    the files of regions, as the agent is told of them, and their leases
 *   shim_swap.c     segments, and shared pages under regions, as the agent asks
 *   shim.c          the thread's life; start, stop, fork
 *
 * Each calls what stands above it, and nothing below.
 *
 * The thread is made by clone directly and shares the program's thread-local storage with the thread that made it. So
 * nothing in these files may touch errno, allocate, or call a function of libc that does: system calls go through
 * sa_call, memory is static.
 */
#ifndef SA_SHIM_PARTS_H
#define SA_SHIM_PARTS_H

#include "frame.h"
#include "sa.h"
#include "shim.h"

#include <stdatomic.h>

#pragma GCC visibility push(hidden)

enum {
	PAGE = SA_PAGE_SIZE,
	MIN_PAGES = 4,     /* smaller mappings are not worth two mappings more */
	MS_LATE = 1000,    /* how long a library must have been there */
	MS_PATIENCE = 1000 /* for the thread's end, for room in the socket */
};

/* ------------------------------------------------------------------------------------------------- shim_call.c */

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

/* ------------------------------------------------------------------------------------------------- shim_sync.c */

/* The lock, for the thread, whose signals are blocked anyway; for the program's it is sa_shim_lock. */
void sa_lock(void);
void sa_unlock(void);

/* All signals of the calling thread. */
void sa_signals_block(uint64_t *ret);
void sa_signals_restore(const uint64_t *signals);

/* What is said to the thread, mostly by the program's. */
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

/* The thread's waits. begin comes first, once in each thread; false: there can be none. */
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

/* ---------------------------------------------------------------------------------------------- shim_regions.c */

enum origin { ORIGIN_START, ORIGIN_PROGRAM, ORIGIN_LATE };

/* A mapping of a file, or a part of one that is a mapping of its own. */
struct region {
	uintptr_t start;
	size_t length;
	uint64_t first; /* page of the file */
	uint64_t dev, ino;
	uintptr_t aside; /* the file's own mapping while pages are shared; 0: nothing is */
	uint32_t pages;  /* that are shared */
	uint32_t pieces; /* mappings that these are */
	int16_t file;    /* NO_FILE, LEFT_ALONE */
	uint8_t protection;
	uint8_t origin;
	bool verified; /* is what it was learned as; before a swap, with the lock */
};

enum { NO_FILE = -1, LEFT_ALONE = -2 };

static inline uintptr_t sa_region_end(const struct region *region)
{
	return region->start + region->length;
}

static inline uintptr_t sa_page_down(uintptr_t address)
{
	return address & ~(uintptr_t)(PAGE - 1);
}

static inline uintptr_t sa_page_end(uintptr_t start, size_t length)
{
	return length > UINTPTR_MAX - PAGE - start ? UINTPTR_MAX & ~(uintptr_t)(PAGE - 1)
	                                           : sa_page_down(start + length + PAGE - 1);
}

/* All of these with the lock. A pointer to a region is good until the lock is given up or a region comes or goes. */

/* Add one, unless it meets another or there is no room. */
void sa_region_add(const struct region *region);
/* The region that begins there and is of that file; NULL: there is none. */
struct region *sa_region_find(const struct region *is);
/* Whether a mapping meets a region, or lies where one has its aside. */
bool sa_region_is_known(const struct region *region);
/* Whether the program has said that it has mapped all of it. */
bool sa_region_is_noted(const struct region *region);

/* Nothing more is done with it. */
void sa_region_leave_alone(struct region *region);
/* Whether there is a region of this file. */
bool sa_regions_have(int16_t file);
/* No region has a file any more. */
void sa_regions_forget_files(void);

/* Before swaps: doubt them all, then verify them by each mapping that is there. */
void sa_regions_doubt(void);
void sa_regions_verify(const struct region *is);
/* The next region of a file that may be swapped; after: the one before, or NULL. */
struct region *sa_region_to_swap(int16_t file, const struct region *after);
/* Mappings that shared pages are, of all regions. */
uint64_t sa_regions_pieces(void);

/* Set the file's own mapping aside; -errno: nothing has changed. What is seen is the file's, until sa_region_share puts
 * pages of a segment there, from a page of the file on. put_back ends both: 0, also if there is nothing to put back, or
 * -errno, and what is shared stays so. */
int sa_region_set_aside(struct region *region);
int sa_region_share(struct region *region, uint64_t page, uint64_t count, int fd, uint64_t offset);
int sa_region_put_back(struct region *region);
/* The same for all regions of a file, for all regions: -errno if one could not be, the others are. */
int sa_regions_put_back(int16_t file);
int sa_regions_put_back_all(void);

/* Whether there is one with shared pages. */
bool sa_regions_are_shared(void);
/* Whether dlclose is under way, in whatever thread. */
bool sa_regions_are_closing(void);
/* In a forked child: everything back, no dlclose under way. */
void sa_regions_after_fork(void);

/* ------------------------------------------------------------------------------------------------- shim_look.c */

struct line {
	struct region region; /* file is NO_FILE, origin not said */
	bool executable;
	const char *path;
};

/* Whether /proc says that no seccomp filter is in force; false too if it does not say. */
bool sa_is_unfiltered(void);

/* Hand the mappings of files that nobody can write through, and that are large enough, to a function, until it says
 * false. A line is good during the call. The thread, or before there is one. */
void sa_maps_walk(bool (*visit)(const struct line *line));

/* Before there is a thread. whole: as in sa_shim_start; all that is mapped now becomes a region. */
void sa_look_begin(bool whole);
/* The thread: look for what was mapped since. A library becomes a region at a second look, MS_LATE after the first. */
void sa_look(void);
/* What was seen so far counts no more: another thread begins. */
void sa_look_forget(void);

/* ------------------------------------------------------------------------------------------------- shim_link.c */

/* All but the first two are for the thread. */

/* Where the agent's socket is. Once; false: the path is too long. */
bool sa_link_aim(const char *socket);
/* There is no connection: another thread begins. */
void sa_link_forget(void);

/* False: there is no agent, or it takes nobody now. */
bool sa_link_connect(void);
/* The connection, descriptors that came with it and are nobody's yet, and what it needed of memory. */
void sa_link_close(void);

/* Send a message, with a descriptor or -1. False: the connection is of no use any more. */
bool sa_link_send(uint32_t type, const uint64_t *fields, size_t n, int fd);
/* As sa_wait: whether there is something to take, also an end. */
bool sa_link_wait(int64_t ms, bool *ret_go);
/* Receive, and hand over each whole message, with its descriptor or -1, which goes with it, until it says false. False:
 * the connection is of no use any more. */
bool sa_link_take(bool (*take)(const struct sa_frame *frame, int fd));

/* ------------------------------------------------------------------------------------------------ shim_files.c */

/* A file that the agent has been told of. The thread's alone. */
struct file {
	bool used;
	bool told;
	bool grown; /* mapped once more since it was told */
	int fd;     /* read only */
	int lease;  /* -1: nothing is shared */
	uint32_t handle;
	uint64_t dev, ino;
};

/* There are none: another thread begins. */
void sa_files_forget(void);

/* Open the files of regions that have none. */
void sa_files_open(void);
/* Tell the agent of files that it does not know, or of which more is mapped since. False: as sa_link_send. */
bool sa_files_tell(void);
/* Close the files that no region is of any more, if regions went away. False: as sa_link_send. */
bool sa_files_drop_unused(void);

/* NULL: there is none, or none any more. */
struct file *sa_file_by_handle(uint32_t handle);
/* What its regions have as their file. */
int16_t sa_file_index(const struct file *file);
/* The file's own pages everywhere, also in children; then the lease goes. */
void sa_file_put_back(struct file *file);
/* The same for all of them, and the agent has to be told of them again. */
void sa_files_put_back(void);

/* ------------------------------------------------------------------------------------------------- shim_swap.c */

/* Once in each thread, before there is a connection. */
void sa_swap_begin(void);
/* The agent's segments, when its connection has ended. */
void sa_swap_forget(void);
/* Do what a message asks, and answer it; for sa_link_take. */
bool sa_swap_answer(const struct sa_frame *frame, int fd);

#pragma GCC visibility pop

#endif
