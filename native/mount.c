/*
 * mount.c - which mount a file is on, by a number that no other mount gets while the kernel runs.
 *
 * A device number does not tell one file system from the next: a loop device that was given back has the same for
 * another image (seen). statx(2) has had a number for mounts that is never used again since Linux 6.8.
 */
#include "sa.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* include/uapi/linux/stat.h; the C library's struct statx of Debian 12 has no name for the field. */
enum { STATX_BYTES = 256, AT_MASK = 0, AT_MNT_ID = 144, MNT_ID_UNIQUE = 0x4000 };

int sa_mount_id(int fd, uint64_t *ret)
{
	uint8_t found[STATX_BYTES] = {0};
	uint32_t mask;

	*ret = 0;
	if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, MNT_ID_UNIQUE, found) < 0)
		return -errno;
	memcpy(&mask, found + AT_MASK, sizeof mask);
	if (mask & MNT_ID_UNIQUE)
		memcpy(ret, found + AT_MNT_ID, sizeof *ret);
	return 0;
}
