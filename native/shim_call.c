/*
 * shim_call.c - what the shim's files make of system calls alone: time, sleep, reading. None keeps anything. The call
 * itself is shim.h's.
 */
#include "shim_parts.h"

#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <string.h>
#include <time.h>

int64_t sa_now_ms(void)
{
	struct timespec time = {0, 0};

	(void)sa_call3(__NR_clock_gettime, CLOCK_MONOTONIC, sa_at(&time), 0); /* cannot fail */
	return time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

void sa_futex_wait(const _Atomic uint32_t *word, uint32_t value, int private, int64_t ms)
{
	const struct timespec time = {ms / 1000, ms % 1000 * 1000000};

	(void)sa_call(__NR_futex, (long)(uintptr_t)word, FUTEX_WAIT | private, (long)value, ms < 0 ? 0 : sa_at(&time),
	              0, 0);
}

void sa_close_fd(int *fd)
{
	if (*fd >= 0)
		(void)sa_call3(__NR_close, *fd, 0, 0); /* closed whatever it returns (Linux) */
	*fd = -1;
}

int sa_open_read(const char *path)
{
	return (int)sa_call(__NR_openat, AT_FDCWD, sa_at(path), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0, 0, 0);
}

long sa_read_some(int fd, void *into, size_t length)
{
	long n;

	do {
		n = sa_call3(__NR_read, fd, sa_at(into), (long)length);
	} while (n == -EINTR);
	return n;
}

bool sa_read_all(int fd, uint8_t *into, size_t length, uint64_t offset, bool pad)
{
	size_t done = 0;

	while (done < length) {
		const long n = sa_call(__NR_pread64, fd, sa_at(into + done), (long)(length - done),
		                       (long)(offset + done), 0, 0);

		if (n > 0)
			done += (size_t)n;
		else if (n != -EINTR)
			break;
	}
	/* The last page of a file may be short; one that is not there at all is not equal to anything. */
	if (done == length || !pad || done % PAGE == 0)
		return done == length;
	memset(into + done, 0, PAGE - done % PAGE);
	return done + (PAGE - done % PAGE) == length;
}

uint64_t sa_first_number(const char *path)
{
	char text[32];
	int fd = sa_open_read(path);
	uint64_t number = 0;
	long n;

	if (fd < 0)
		return 0;
	n = sa_read_some(fd, text, sizeof text);
	sa_close_fd(&fd);
	for (long i = 0; i < n && text[i] >= '0' && text[i] <= '9'; i++)
		number = number * 10 + (uint64_t)(text[i] - '0');
	return number;
}
