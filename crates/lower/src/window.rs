//! To come.
use crate::fuse::Group;
use crate::lowering::Lowering;
use tilewright_base::Result;

impl Lowering<'_> {
    pub(crate) fn window_group(&mut self, group: &Group) -> Result<()> {
        self.host_group(group)
    }
}
