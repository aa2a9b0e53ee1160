/*
 * shim_link.c - the thread's connection to the agent: frames out, frames in, descriptors beside them.
 *
 * All of it is the thread's alone. What frames are made of is frame.c's, what messages mean is shim_swap.c's.
 */
#include "shim_parts.h"

#include <asm/unistd.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { MAX_FDS = 256 /* descriptors that may come ahead of their messages */ };

static char socket_path[sizeof((struct sockaddr_un *)NULL)->sun_path];
static int link_fd;
static int fds[MAX_FDS];
static size_t nfds;
static uint8_t frame_bytes[SA_FRAME_HEADER + SA_FRAME_MOST];
static size_t frame_length;

bool sa_link_aim(const char *socket)
{
	if (strlen(socket) >= sizeof socket_path)
		return false;
	memcpy(socket_path, socket, strlen(socket));
	return true;
}

void sa_link_forget(void)
{
	link_fd = -1;
	nfds = frame_length = 0;
}

bool sa_link_connect(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};

	memcpy(address.sun_path, socket_path, sizeof address.sun_path);
	link_fd = (int)sa_call3(__NR_socket, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (link_fd < 0)
		return false;
	if (sa_call3(__NR_connect, link_fd, sa_at(&address), sizeof address) < 0) {
		sa_close_fd(&link_fd);
		return false;
	}
	return true;
}

void sa_link_close(void)
{
	sa_close_fd(&link_fd);
	while (nfds)
		sa_close_fd(&fds[--nfds]);
	frame_length = 0;
	(void)sa_call3(__NR_madvise, (long)sa_page_end((uintptr_t)frame_bytes, 0),
	               (long)(sizeof frame_bytes - 2 * PAGE), MADV_DONTNEED);
}

bool sa_link_wait(int64_t ms, bool *ret_go)
{
	return sa_wait(link_fd, POLLIN, ms, ret_go) != 0;
}

bool sa_link_send(uint32_t type, const uint64_t *fields, size_t n, int fd)
{
	uint8_t frame[SA_FRAME_SENT];
	const size_t length = sa_frame_write(type, fields, n, frame);
	union {
		struct cmsghdr header;
		uint8_t bytes[CMSG_SPACE(sizeof(int))];
	} control = {.bytes = {0}};
	const int64_t end = sa_now_ms() + MS_PATIENCE;
	size_t sent = 0;
	bool go = true;

	while (sent < length) {
		struct iovec part = {frame + sent, length - sent};
		struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
		long got;

		if (fd >= 0 && sent == 0) {
			control.header = (struct cmsghdr){CMSG_LEN(sizeof fd), SOL_SOCKET, SCM_RIGHTS};
			memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
			message.msg_control = &control;
			message.msg_controllen = sizeof control;
		}
		got = sa_call3(__NR_sendmsg, link_fd, sa_at(&message), MSG_NOSIGNAL | MSG_DONTWAIT);
		if (got > 0) {
			sent += (size_t)got;
		} else if (got == -EAGAIN) {
			const int64_t left = end - sa_now_ms();

			/* A wake-up ends it early, and is taken up by what it has set. */
			if (left > 0)
				(void)sa_wait(link_fd, POLLOUT, left, &go);
			if (left <= 0 || !go)
				return false;
		} else if (got != -EINTR) {
			return false;
		}
	}
	return true;
}

static bool receive_some(void)
{
	uint8_t control[CMSG_SPACE(sizeof(int) * 64)] __attribute__((aligned(8)));
	struct iovec part = {frame_bytes + frame_length, sizeof frame_bytes - frame_length};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	const long got = sa_call3(__NR_recvmsg, link_fd, sa_at(&message), MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	if (got == -EAGAIN || got == -EINTR)
		return true;
	if (got <= 0)
		return false;
	for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
		const size_t n = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < n; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
			if (nfds == MAX_FDS)
				sa_close_fd(&fd);
			else
				fds[nfds++] = fd;
		}
	}
	frame_length += (size_t)got;
	return (message.msg_flags & MSG_CTRUNC) == 0 && nfds < MAX_FDS;
}

/* Take up the whole frames that have arrived. */
static bool take_frames(bool (*take)(const struct sa_frame *frame, int fd))
{
	size_t used = 0;

	while (frame_length - used >= SA_FRAME_HEADER) {
		const uint32_t length = sa_frame_u32(frame_bytes + used, 0);
		struct sa_frame frame;
		int fd = -1;

		if (length == 0 || length > SA_FRAME_MOST)
			return false;
		if (frame_length - used - SA_FRAME_HEADER < length)
			break;
		if (sa_frame_read(frame_bytes + used + SA_FRAME_HEADER, length, &frame) != 0)
			return false;
		if (frame.with_fd) {
			if (nfds == 0)
				return false;
			fd = fds[0];
			memmove(fds, fds + 1, --nfds * sizeof fds[0]);
		}
		if (!take(&frame, fd))
			return false;
		used += SA_FRAME_HEADER + length;
	}
	memmove(frame_bytes, frame_bytes + used, frame_length - used);
	frame_length -= used;
	return true;
}

bool sa_link_take(bool (*take)(const struct sa_frame *frame, int fd))
{
	return receive_some() && take_frames(take);
}
