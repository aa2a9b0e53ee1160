/*
 * sharearea.h - shared pages for C programs on the `local` backend: a file is mapped read only, and wherever the agent has a
 * page of it in the sharing area, that page lies under the mapping in place of the file's own. What is read is always what
 * the file holds: whoever opens it for writing waits until this process is back on the file's own pages.
 *
 *   cc example.c -I DIRECTORY -L DIRECTORY -lsharearea      (docs/programs.md says which directory, and has an example)
 *
 * The agent's socket is that of $SHAREAREA_AGENT_SOCKET, or /run/sharearea-agent/consumers.sock. Without an agent a
 * mapping is simply the file. All functions may be called by any thread; one file is closed once. Mappings are inherited
 * by fork, on the file's own pages at first. Do not mprotect, mremap, munmap or mlock what is mapped here.
 *
 * The first sharearea_open starts one thread, which talks to the agent. It has no signals and no descriptors of the program.
 * It keeps the rights that the program had at that moment: give up rights before. A seccomp filter that is put on all
 * threads later has to allow what it calls (docs/preload.md). A process under a filter or a limit of address space
 * (RLIMIT_AS) shares nothing. Reading past the end of a file that was cut short is SIGBUS, as with any mapping.
 */
#ifndef SHAREAREA_H
#define SHAREAREA_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sharearea_file sharearea_file;

/* Map a whole regular file. 0, or -errno: of open, fstat or mmap; -EINVAL for what is no regular file or is empty. Never
 * waits for the agent, nor fails because of it: pages become shared, and plain again, at any later time. */
int sharearea_open(const char *path, sharearea_file **ret);

/* Where it is mapped, and its length in bytes when it was. Good until sharearea_close. */
const void *sharearea_address(const sharearea_file *file);
size_t sharearea_length(const sharearea_file *file);

/* How many bytes of it are shared at this moment, in whole pages. 0 in a program that runs with the shim: it does the
 * sharing then, see `sharearea-agent ps`. */
size_t sharearea_shared(const sharearea_file *file);

/* Unmap it. NULL is fine. */
void sharearea_close(sharearea_file *file);

#ifdef __cplusplus
}
#endif

#endif
