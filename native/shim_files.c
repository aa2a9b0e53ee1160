/*
 * shim_files.c - the files of regions, as the agent knows them: opened, told of, told of again when more of them is
 * mapped, closed when none is; and the leases under which their pages are shared.
 *
 * All of it is the thread's alone; the lock is taken for the regions. What is shared of a file is shim_swap.c's.
 */
#include "shim_parts.h"

#include <asm/unistd.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum { MAX_FILES = 1024 };

static struct file files[MAX_FILES];
static uint32_t next_handle;

void sa_files_forget(void)
{
	memset(files, 0, sizeof files);
}

int16_t sa_file_index(const struct file *file)
{
	return (int16_t)(file - files);
}

struct file *sa_file_by_handle(uint32_t handle)
{
	for (size_t i = 0; i < MAX_FILES; i++) {
		if (files[i].used && files[i].handle == handle)
			return &files[i];
	}
	return NULL;
}

static struct file *file_of(uint64_t dev, uint64_t ino)
{
	for (size_t i = 0; i < MAX_FILES; i++) {
		if (files[i].used && files[i].dev == dev && files[i].ino == ino)
			return &files[i];
	}
	return NULL;
}

static struct file *open_file(const struct line *line)
{
	struct stat info;
	int fd = sa_open_read(line->path);

	if (fd < 0)
		return NULL;
	for (size_t i = 0; i < MAX_FILES; i++) {
		struct file *file = &files[i];

		if (file->used)
			continue;
		/* The path may name another file by now. */
		if (sa_call3(__NR_fstat, fd, sa_at(&info), 0) < 0 || !S_ISREG(info.st_mode) || info.st_size <= 0 ||
		    info.st_dev != line->region.dev || info.st_ino != line->region.ino)
			break;
		*file = (struct file){.used = true, .fd = fd, .lease = -1, .dev = info.st_dev, .ino = info.st_ino};
		file->handle = ++next_handle;
		return file;
	}
	sa_close_fd(&fd);
	return NULL;
}

/* Without the lock: a file may be slow to open. */
static bool open_for_region(const struct line *line)
{
	struct file *file = file_of(line->region.dev, line->region.ino);
	struct region *region;
	bool wanted;

	sa_lock();
	region = sa_region_find(&line->region);
	wanted = region && region->file == NO_FILE;
	sa_unlock();
	if (!wanted)
		return true;
	if (file == NULL)
		file = open_file(line);
	sa_lock();
	region = sa_region_find(&line->region);
	if (region)
		region->file = file ? sa_file_index(file) : LEFT_ALONE;
	sa_unlock();
	if (file)
		file->grown = true;
	return !atomic_load(&sa_stopping);
}

void sa_files_open(void)
{
	sa_maps_walk(open_for_region);
}

/* The kernel always has room for it unless the program is at its limit of mappings and takes what the reserve gives
 * back: then it is tried again. */
void sa_file_put_back(struct file *file)
{
	for (;;) {
		int error;

		sa_lock();
		error = sa_regions_put_back(sa_file_index(file));
		sa_unlock();
		if (error == 0)
			break;
		(void)sa_call3(__NR_nanosleep, sa_at(&(struct timespec){0, 10000000}), 0, 0);
	}
	if (file->lease >= 0)
		sa_children_wait();
	sa_close_fd(&file->lease);
}

void sa_files_put_back(void)
{
	for (size_t i = 0; i < MAX_FILES; i++) {
		if (files[i].used)
			sa_file_put_back(&files[i]);
		files[i].told = false;
	}
}

bool sa_files_tell(void)
{
	for (size_t i = 0; i < MAX_FILES; i++) {
		struct file *file = &files[i];
		struct stat info;

		if (!file->used || (file->told && !file->grown))
			continue;
		file->grown = false;
		if (file->told) {
			/* The agent shares a file as a whole: once more from the beginning. */
			sa_file_put_back(file);
			file->told = false;
			if (!sa_link_send(SA_CLOSE, (uint64_t[]){file->handle}, 1, -1))
				return false;
			file->handle = ++next_handle;
		}
		if (sa_call3(__NR_fstat, file->fd, sa_at(&info), 0) < 0 || info.st_size <= 0)
			continue; /* empty for now: the next look tries again */
		file->told = true;
		if (!sa_link_send(SA_OPEN, (uint64_t[]){file->handle, (uint64_t)info.st_size}, 2, file->fd))
			return false;
	}
	return true;
}

bool sa_files_drop_unused(void)
{
	if (!atomic_exchange(&sa_emptied, false))
		return true;
	for (size_t i = 0; i < MAX_FILES; i++) {
		struct file *file = &files[i];
		bool used;

		if (!file->used)
			continue;
		sa_lock();
		used = sa_regions_have((int16_t)i);
		sa_unlock();
		if (used)
			continue;
		if (file->lease >= 0)
			sa_children_wait();
		sa_close_fd(&file->lease);
		sa_close_fd(&file->fd);
		file->used = false;
		if (file->told && !sa_link_send(SA_CLOSE, (uint64_t[]){file->handle}, 1, -1)) {
			atomic_store(&sa_emptied, true); /* for the files behind it */
			return false;
		}
	}
	return true;
}
