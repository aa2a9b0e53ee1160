// SPDX-License-Identifier: GPL-2.0-only
/*
 * shareview: inodes, names and directories. All of it is the lower file system's; nothing is kept
 * here that could grow old but a name's validity, which is looked at again at every walk.
 */
#include <linux/cred.h>
#include <linux/fs_stack.h>
#include <linux/namei.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "internal.h"

static struct kmem_cache *sv_inode_cache;

/* ---------------------------------------------------------------------------------- attributes */

static int sv_inode_getattr(SV_IDMAP_ARG const struct path *path, struct kstat *stat, u32 mask,
			    unsigned int flags)
{
	struct path lower;

	sv_lower_path(path->dentry, &lower);
	return sv_getattr(&lower, stat, mask, flags);
}

/* Also without blocking (MAY_NOT_BLOCK): an inode and what it points to are freed after RCU. */
static int sv_permission(SV_IDMAP_ARG struct inode *inode, int mask)
{
	return sv_inode_permission(sv_inode(inode)->lower, mask);
}

static const char *sv_get_link(struct dentry *dentry, struct inode *inode,
			       struct delayed_call *done)
{
	if (!dentry)
		return ERR_PTR(-ECHILD);
	return vfs_get_link(sv_lower_dentry(dentry), done);
}

static ssize_t sv_listxattr(struct dentry *dentry, char *list, size_t size)
{
	return vfs_listxattr(sv_lower_dentry(dentry), list, size);
}

static int sv_xattr_get(const struct xattr_handler *handler, struct dentry *dentry,
			struct inode *inode, const char *name, void *value, size_t size)
{
	return sv_vfs_getxattr(sv_lower_dentry(dentry), name, value, size);
}

static const struct xattr_handler sv_xattr_handler = {
	.prefix = "",
	.get = sv_xattr_get,
};

SV_XATTR_LIST sv_xattr_handlers[] = { &sv_xattr_handler, NULL };

/* Exec takes owner and set-id bits from the inode itself. */
static void sv_copy_attributes(struct inode *inode)
{
	struct inode *lower = sv_inode(inode)->lower;

	fsstack_copy_attr_all(inode, lower);
	fsstack_copy_inode_size(inode, lower);
}

static bool sv_attributes_are_old(const struct inode *inode)
{
	const struct inode *lower = sv_inode(inode)->lower;

	return inode->i_mode != lower->i_mode || !uid_eq(inode->i_uid, lower->i_uid) ||
	       !gid_eq(inode->i_gid, lower->i_gid) || i_size_read(inode) != i_size_read(lower);
}

/* --------------------------------------------------------------------------------------- names */

/*
 * Whether a name here still stands for the same lower name. The lower dentry is ours (d_fsdata),
 * but it may have been renamed, unlinked or filled. Under RCU it may even be about to be freed,
 * which is why its name is compared as a string that ends, whatever length it claims.
 */
static bool sv_is_current(const struct dentry *dentry, const struct inode *inode)
{
	const struct dentry *lower = sv_lower_dentry(dentry);
	const struct dentry *parent = READ_ONCE(dentry->d_parent);
	bool same;
	unsigned int seq;

	rcu_read_lock();
	seq = read_seqcount_begin(&lower->d_seq);
	same = !d_unhashed(lower) && READ_ONCE(lower->d_parent) == sv_lower_dentry(parent) &&
	       READ_ONCE(lower->d_inode) == (inode ? sv_inode(inode)->lower : NULL) &&
	       !strcmp(READ_ONCE(lower->d_name.name), READ_ONCE(dentry->d_name.name)) &&
	       !read_seqcount_retry(&lower->d_seq, seq);
	rcu_read_unlock();
	return same;
}

static int sv_d_revalidate(struct dentry *dentry, unsigned int flags)
{
	struct inode *inode = d_inode_rcu(dentry);
	bool blocking = !(flags & LOOKUP_RCU);

	if (!IS_ROOT(dentry) && !sv_is_current(dentry, inode))
		return blocking ? 0 : -ECHILD;
	if (inode && sv_attributes_are_old(inode)) {
		if (!blocking)
			return -ECHILD;
		sv_copy_attributes(inode);
	}
	return 1;
}

static void sv_d_release(struct dentry *dentry)
{
	dput(sv_lower_dentry(dentry));
}

const struct dentry_operations sv_dentry_operations = {
	.d_revalidate = sv_d_revalidate,
	.d_release = sv_d_release,
};

static struct dentry *sv_lookup(struct inode *dir, struct dentry *dentry, unsigned int flags)
{
	struct dentry *lower;
	struct inode *inode = NULL;

	lower = lookup_one_len_unlocked(dentry->d_name.name, sv_lower_dentry(dentry->d_parent),
					dentry->d_name.len);
	if (IS_ERR(lower))
		return lower;
	dentry->d_fsdata = lower;
	if (d_is_positive(lower)) {
		inode = sv_iget(dentry->d_sb, d_inode(lower));
		if (IS_ERR(inode))
			return ERR_CAST(inode);
	}
	return d_splice_alias(inode, dentry);
}

static const struct inode_operations sv_dir_inode_operations = {
	.lookup = sv_lookup,
	.getattr = sv_inode_getattr,
	.permission = sv_permission,
	.listxattr = sv_listxattr,
};

static const struct inode_operations sv_link_inode_operations = {
	.get_link = sv_get_link,
	.getattr = sv_inode_getattr,
	.permission = sv_permission,
	.listxattr = sv_listxattr,
};

static const struct inode_operations sv_inode_operations = {
	.getattr = sv_inode_getattr,
	.permission = sv_permission,
	.listxattr = sv_listxattr,
};

/* -------------------------------------------------------------------------------------- inodes */

static int sv_inode_test(struct inode *inode, void *lower)
{
	return sv_inode(inode)->lower == lower;
}

static int sv_inode_set(struct inode *inode, void *lower)
{
	ihold(lower);
	sv_inode(inode)->lower = lower;
	return 0;
}

/* Return the inode that stands for a lower one, which the caller has. */
struct inode *sv_iget(struct super_block *sb, struct inode *lower)
{
	struct inode *inode;

	inode = iget5_locked(sb, (unsigned long)lower, sv_inode_test, sv_inode_set, lower);
	if (!inode)
		return ERR_PTR(-ENOMEM);
	if (!(inode->i_state & I_NEW))
		return inode;
	inode->i_ino = lower->i_ino;
	sv_copy_attributes(inode);
	if (S_ISDIR(inode->i_mode)) {
		inode->i_op = &sv_dir_inode_operations;
		inode->i_fop = &sv_dir_operations;
	} else if (S_ISLNK(inode->i_mode)) {
		inode->i_op = &sv_link_inode_operations;
	} else if (S_ISREG(inode->i_mode)) {
		inode->i_op = &sv_inode_operations;
		inode->i_fop = &sv_file_operations;
	} else {
		inode->i_op = &sv_inode_operations;
		init_special_inode(inode, inode->i_mode, lower->i_rdev);
	}
	unlock_new_inode(inode);
	return inode;
}

struct inode *sv_alloc_inode(struct super_block *sb)
{
	struct sv_inode *si = alloc_inode_sb(sb, sv_inode_cache, GFP_KERNEL);

	if (!si)
		return NULL;
	si->lower = NULL;
	RCU_INIT_POINTER(si->table, NULL);
	return &si->vfs_inode;
}

void sv_free_inode(struct inode *inode)
{
	kmem_cache_free(sv_inode_cache, sv_inode(inode));
}

/* The pointer to the lower inode stays as it is: a walk under RCU may still look at it. */
void sv_evict_inode(struct inode *inode)
{
	truncate_inode_pages_final(&inode->i_data);
	clear_inode(inode);
	iput(sv_inode(inode)->lower);
}

static void sv_inode_once(void *memory)
{
	struct sv_inode *si = memory;

	mutex_init(&si->lock);
	inode_init_once(&si->vfs_inode);
}

int sv_inode_cache_create(void)
{
	sv_inode_cache = kmem_cache_create("shareview_inode", sizeof(struct sv_inode), 0,
					   SLAB_RECLAIM_ACCOUNT | SLAB_ACCOUNT, sv_inode_once);
	return sv_inode_cache ? 0 : -ENOMEM;
}

/* After the last mount is gone. */
void sv_inode_cache_destroy(void)
{
	rcu_barrier();
	kmem_cache_destroy(sv_inode_cache);
}
