/*
 * library.c - sharearea.h over the shim: the same thread and the same table as in unchanged programs, for mappings that the
 * program asks for. In a program that runs with the shim the latter does it all, and this only maps.
 */
#include "sharearea.h"

#include "shim.h"

#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

struct sharearea_file {
	void *at;
	size_t length;
};

static pthread_once_t once = PTHREAD_ONCE_INIT;

static int is_shim(struct dl_phdr_info *info, size_t size, void *argument)
{
	const char *name = strrchr(info->dlpi_name, '/');

	(void)size;
	(void)argument;
	return name != NULL && strcmp(name, "/libsharearea_preload.so") == 0;
}

static void start(void)
{
	const char *socket = getenv("SHAREAREA_AGENT_SOCKET");

	if (dl_iterate_phdr(is_shim, NULL) ||
	    pthread_atfork(sa_shim_before_fork, sa_shim_after_fork_parent, sa_shim_after_fork_child) != 0)
		return;
	sa_shim_start(socket && *socket ? socket : "/run/sharearea-agent/consumers.sock", false);
}

static int map_file(int fd, sharearea_file *file)
{
	struct stat info;
	struct sa_held held;

	if (fstat(fd, &info) < 0)
		return -errno;
	if (!S_ISREG(info.st_mode) || info.st_size <= 0)
		return -EINVAL;
	file->length = (size_t)info.st_size;
	file->at = mmap(NULL, file->length, PROT_READ, MAP_PRIVATE, fd, 0);
	if (file->at == MAP_FAILED)
		return -errno;
	if (sa_shim_watches()) {
		sa_shim_lock(&held);
		sa_shim_mapped((uintptr_t)file->at, file->length);
		sa_shim_unlock(&held);
	}
	return 0;
}

EXPORT int sharearea_open(const char *path, sharearea_file **ret)
{
	sharearea_file *file;
	int error;
	int fd;

	*ret = NULL;
	error = -pthread_once(&once, start);
	if (error)
		return error;
	file = calloc(1, sizeof *file);
	if (file == NULL)
		return -ENOMEM;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	error = fd < 0 ? -errno : map_file(fd, file);
	if (fd >= 0)
		(void)close(fd); /* read only: nothing can be lost */
	if (error)
		free(file);
	else
		*ret = file;
	return error;
}

EXPORT const void *sharearea_address(const sharearea_file *file)
{
	return file->at;
}

EXPORT size_t sharearea_length(const sharearea_file *file)
{
	return file->length;
}

EXPORT size_t sharearea_shared(const sharearea_file *file)
{
	struct sa_held held;
	size_t shared;

	if (!sa_shim_watches())
		return 0;
	sa_shim_lock(&held);
	shared = sa_shim_shared((uintptr_t)file->at, file->length);
	sa_shim_unlock(&held);
	return shared;
}

EXPORT void sharearea_close(sharearea_file *file)
{
	struct sa_held held;

	if (file == NULL)
		return;
	if (sa_shim_watches()) {
		sa_shim_lock(&held);
		if (sa_call(__NR_munmap, (long)(uintptr_t)file->at, (long)file->length, 0, 0, 0, 0) == 0)
			sa_shim_gone((uintptr_t)file->at, file->length);
		sa_shim_unlock(&held);
	} else {
		(void)munmap(file->at, file->length); /* a mapping of our own, whole */
	}
	free(file);
}
