/*
 * vchan_peer.c - a peer that is not ours: the other end of a vchan, by libxenvchan. Sends one file and receives a number
 * of bytes into another, both at once, and prints how long it took as one line of JSON.
 *
 *   vchan_peer serve|connect DOMID PATH SEND_FILE|- RECEIVE_BYTES RECEIVE_FILE|- [READ_BYTES WRITE_BYTES]
 *
 * PATH is the xenstore path of the server's node: its own, relative (serve), or absolute (connect). READ_BYTES and
 * WRITE_BYTES are what a server asks of its rings. What was sent and received is compared by who runs it. Linked
 * statically, so that it runs in any guest: see build_peer() in link_run.py.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <libxenvchan.h>

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static int fail(const char *what)
{
	fprintf(stderr, "vchan_peer: %s: %s\n", what, strerror(errno));
	return 1;
}

static char *read_file(const char *path, size_t *ret_bytes)
{
	struct stat info;
	char *bytes;
	size_t done = 0;
	int fd;

	*ret_bytes = 0;
	if (strcmp(path, "-") == 0)
		return calloc(1, 1);
	fd = open(path, O_RDONLY);
	if (fd < 0 || fstat(fd, &info) < 0)
		exit(fail(path));
	bytes = malloc((size_t)info.st_size + 1);
	while (bytes && done < (size_t)info.st_size) {
		ssize_t n = read(fd, bytes + done, (size_t)info.st_size - done);

		if (n <= 0)
			exit(fail(path));
		done += (size_t)n;
	}
	close(fd);
	*ret_bytes = done;
	return bytes;
}

int main(int argc, char **argv)
{
	struct libxenvchan *vchan;
	char *out, *in;
	size_t out_bytes, in_bytes, sent = 0, got = 0;
	double start;
	int serve;

	if (argc != 7 && argc != 9) {
		fprintf(stderr, "usage: vchan_peer serve|connect DOMID PATH SEND RECEIVE_BYTES RECEIVE [READ WRITE]\n");
		return 2;
	}
	serve = strcmp(argv[1], "serve") == 0;
	out = read_file(argv[4], &out_bytes);
	in_bytes = (size_t)atol(argv[5]);
	in = malloc(in_bytes + 1);
	vchan = serve ? libxenvchan_server_init(NULL, atoi(argv[2]), argv[3], argc == 9 ? (size_t)atol(argv[7]) : 65536,
	                                        argc == 9 ? (size_t)atol(argv[8]) : 65536)
	              : libxenvchan_client_init(NULL, atoi(argv[2]), argv[3]);
	if (vchan == NULL || out == NULL || in == NULL)
		return fail(argv[1]);
	while (serve && libxenvchan_is_open(vchan) == 2)
		libxenvchan_wait(vchan);
	start = now();
	while (sent < out_bytes || got < in_bytes) {
		int written = 0, taken = 0;

		if (sent < out_bytes)
			written = libxenvchan_write(vchan, out + sent, out_bytes - sent > 65536 ? 65536 : out_bytes - sent);
		if (got < in_bytes)
			taken = libxenvchan_read(vchan, in + got, in_bytes - got > 65536 ? 65536 : in_bytes - got);
		if (written < 0 || taken < 0) {
			fprintf(stderr, "vchan_peer: closed after %zu of %zu sent, %zu of %zu received\n", sent, out_bytes, got,
			        in_bytes);
			return 1;
		}
		sent += (size_t)written;
		got += (size_t)taken;
		if (written == 0 && taken == 0 && libxenvchan_wait(vchan) < 0)
			return fail("wait");
	}
	printf("{\"seconds\": %.4f, \"sent\": %zu, \"received\": %zu}\n", now() - start, sent, got);
	fflush(stdout);
	if (strcmp(argv[6], "-") != 0) {
		FILE *file = fopen(argv[6], "wb");

		if (file == NULL || fwrite(in, 1, got, file) != got || fclose(file) != 0)
			return fail(argv[6]);
	}
	/* Who sent last does not know that all has arrived; the peer hangs up when it has. */
	while (out_bytes && libxenvchan_is_open(vchan) && libxenvchan_buffer_space(vchan) < 65536 && serve)
		libxenvchan_wait(vchan);
	libxenvchan_close(vchan);
	return 0;
}
